"""The directory of a run: whose it is, and the record it keeps.

`config.json` says which run it belongs to, `metrics.jsonl` has one line an epoch, `checkpoints/`
the states to go on from.
"""

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.errors import UserError
from activemlp_jax.training.config import differing_keys

Record = dict[str, Any]


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Make `workdir` this run's, or see that it already is; nothing of another run is touched.

    Raises:
      UserError: it cannot be written, or belongs to a run with other settings, each named.
    """
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                theirs = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not readable as JSON: {error}") from error
            differences = differing_keys(ours, theirs)
            if differences:
                raise UserError(
                    f"{workdir} belongs to a run with other settings: {'; '.join(differences)}; "
                    "give another --workdir"
                )
        elif any(workdir.iterdir()):
            raise UserError(
                f"{workdir} holds files but no config.json of a run; give an empty or new --workdir"
            )
        _write_aside(path, json.dumps(ours, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from error


def _write_aside(path: Path, text: str) -> None:
    """Replace a file in one step, so that no reader or kill sees half of it."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    os.replace(aside, path)


def read_records(workdir: Path) -> list[Record]:
    """The epochs so far; a last line that a kill cut short does not count."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def rewind_records(workdir: Path, step: int) -> list[Record]:
    """Forget the epochs after `step`, which a resumed run repeats; returns those that remain."""
    records = [record for record in read_records(workdir) if record["step"] <= step]
    lines = [json.dumps(record) + "\n" for record in records]
    _write_aside(workdir / "metrics.jsonl", "".join(lines))
    return records


def append_record(workdir: Path, record: Record) -> None:
    """Write one epoch's line."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")

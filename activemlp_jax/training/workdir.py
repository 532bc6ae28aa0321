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
    aside = _aside(path)
    ours = json.loads(config.to_json())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                theirs = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not readable as JSON: {error}") from error
            if not isinstance(theirs, dict):
                raise UserError(f"{path} is no config of a run: expected a JSON object")
            differences = differing_keys(ours, theirs)
            if differences:
                raise UserError(
                    f"{workdir} belongs to a run with other settings: {'; '.join(differences)}; "
                    "give another --workdir"
                )
        elif any(other != aside for other in workdir.iterdir()):
            raise UserError(
                f"{workdir} holds files but no config.json of a run; give an empty or new --workdir"
            )
        _replace(path, json.dumps(ours, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from error


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(path: Path, mode: str, text: str) -> None:
    """Write and wait for the disk, so that a power cut leaves no empty file behind."""
    with path.open(mode) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Replace a file in one step, so that no reader or kill sees half of it."""
    _write(_aside(path), "w", text)
    os.replace(_aside(path), path)


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
    _replace(workdir / "metrics.jsonl", "".join(lines))
    return records


def append_record(workdir: Path, record: Record) -> None:
    """Write one epoch's line."""
    _write(workdir / "metrics.jsonl", "a", json.dumps(record) + "\n")

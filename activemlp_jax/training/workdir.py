"""The directory of a run: whose it is, and the record it keeps.

`config.json` says which run it belongs to, `metrics.jsonl` has one line an epoch, `steps.jsonl` one
for every `config.log_every_steps` steps, `checkpoints/` the states to go on from.
"""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from activemlp_jax.errors import UserError
from activemlp_jax.training.config import differing_keys

Record = dict[str, Any]

LOCK, MARK = ".lock", ".mark"
EPOCHS, STEPS = "metrics.jsonl", "steps.jsonl"


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Make `workdir` this run's alone, inside; nothing of another run is touched.

    Raises:
      UserError: it cannot be written, belongs to a run with other settings, each named, or is in
        use by a run that is alive.
    """
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    lock = FileLock(workdir / LOCK, timeout=0)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _check_owner(workdir, ours)
        _acquire(lock)
        _replace(path, json.dumps(ours, indent=2) + "\n")
    except Timeout as error:
        raise UserError(
            f"{workdir} is in use by a run that is alive; stop that, or give another --workdir; if "
            f"none is alive, as when a machine on a network file system vanished, remove "
            f"{workdir / LOCK}"
        ) from error
    except OSError as error:
        raise UserError(f"{workdir} cannot be written: {error.strerror or error}") from error
    with lock if lock.is_locked else contextlib.nullcontext():
        yield


def _acquire(lock: FileLock) -> None:
    """Raises Timeout if another holds it; a file system without locks has to do without."""
    try:
        lock.acquire()
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise


def _check_owner(workdir: Path, ours: dict[str, Any]) -> None:
    """Raises UserError if `workdir` holds something that is not of a run with these settings."""
    path = workdir / "config.json"
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
    elif any(other not in (_aside(path), workdir / LOCK) for other in workdir.iterdir()):
        raise UserError(
            f"{workdir} holds files but no config.json of a run; give an empty or new --workdir"
        )


def write_mark(workdir: Path) -> None:
    """Leave something in `workdir` by which other hosts know that theirs is the same one."""
    replace_file(workdir / MARK, uuid.uuid4().hex)


def read_mark(workdir: Path) -> str | None:
    """What `write_mark` left, or None."""
    path = workdir / MARK
    return path.read_text() if path.exists() else None


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


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step; raises UserError if it cannot be written."""
    with _written(path):
        _replace(path, text)


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; a last line that a kill cut short does not count."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def rewind_records(path: Path, step: int) -> list[Record]:
    """Forget what comes after `step`, which a resumed run repeats; returns what remains."""
    records = [record for record in read_records(path) if record["step"] <= step]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def append_record(path: Path, record: Record) -> None:
    """Write one line; raises UserError if it cannot be written."""
    with _written(path):
        _write(path, "a", json.dumps(record) + "\n")

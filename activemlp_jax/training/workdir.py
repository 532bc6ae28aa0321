"""The directory of a run: whose it is, and the record it keeps.

`config.json` says which run it belongs to, `metrics.jsonl` has one line an epoch, `steps.jsonl` one
for every `config.log_every_steps` steps, `checkpoints/` the states to go on from.
"""

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from activemlp_jax.training.config import differing_keys
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import partial_path, read_file, write_aside
from activemlp_jax.utils.json_files import expect, parse_json, read_json, short
from activemlp_jax.utils.types import Record

LOCK, MARK = ".lock", ".mark"
EPOCHS, STEPS = "metrics.jsonl", "steps.jsonl"
COUNTS = {EPOCHS: ("epoch", "step"), STEPS: ("step",)}  # keys of each record
MOST_BYTES = 2**30  # of a file of records
MOST_CUT_BYTES = 2**16  # of the line that a kill cut short


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
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise UserError(f"{path} is no config of a run: expected a JSON object")
        differences = differing_keys(ours, theirs)
        if differences:
            raise UserError(
                f"{workdir} belongs to a run with other settings: {'; '.join(differences)}; "
                "give another --workdir"
            )
        return
    # Earlier versions wrote the config aside by a name that is not hidden.
    started = {partial_path(path).name, f"{path.name}.partial", LOCK}
    if any(other.name not in started for other in workdir.iterdir()):
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


def _replace(path: Path, text: str) -> None:
    """Replace a file in one step, so that no reader or kill sees half of it."""
    with write_aside(path) as aside:
        aside.write_text(text)


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
    """The records of a file of JSON lines; a last line that a kill cut short does not count.

    Raises:
      UserError: another line is not a record; its number is named.
    """
    if not path.exists():
        return []
    *lines, rest = read_file(path, MOST_BYTES).split(b"\n")
    if not _is_cut(rest):
        lines.append(rest)
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _is_cut(rest: bytes) -> bool:
    """Whether what follows the last end of a line is nothing, or the beginning of a record."""
    rest = rest.rstrip(b"\0")  # which some file systems leave after a power cut
    begins = rest.startswith(b"{") and rest.isascii() and len(rest) <= MOST_CUT_BYTES
    return not rest or (begins and not rest.endswith(b"}"))


def _parse(path: Path, number: int, line: bytes) -> Record:
    """A line as a record: numbers by name."""
    place = f"{path}, line {number}"
    record = parse_json(line, place)
    try:
        if not isinstance(record, dict):
            raise ValueError(f"it is {short(record)}, expected an object")
        for key in COUNTS.get(path.name, ("step",)):
            if key not in record:
                raise ValueError(f"it has no {key}")
            expect(record[key], key, int, 0, 2**53)
        for key, value in record.items():
            expect(value, key, (int, float), float("-inf"), float("inf"))
    except ValueError as error:
        raise UserError(f"{place} is not a record of a run: {error}") from error
    return record


def rewind_records(path: Path, step: int) -> list[Record]:
    """Forget what comes after `step`, which a resumed run repeats; returns what remains.

    Raises:
      UserError: as `read_records`, and nothing is forgotten; or the file cannot be written.
    """
    records = [record for record in read_records(path) if record["step"] <= step]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def append_record(path: Path, record: Record) -> None:
    """Write one line and wait for the disk; raises UserError if it cannot be written.

    JSON has no NaN, as which a figure over no examples comes: it is left out.
    """
    finite = {key: value for key, value in record.items() if math.isfinite(value)}
    with _written(path), path.open("a") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())

"""The directory of a run: its files, and the lock that lets only one run use it at a time.

`config.json` has the run's settings, `metrics.jsonl` has one line per epoch, `steps.jsonl` has one
line per `config.log_every_steps` steps, and `checkpoints/` has the states to resume from.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from activemlp_jax.training.config import differing_keys
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import partial_path, read_file, write_aside, writing
from activemlp_jax.utils.json_files import expect, parse_json, read_json, short
from activemlp_jax.utils.types import Record

LOCK = ".lock"
EPOCHS_FILE, STEPS_FILE = "metrics.jsonl", "steps.jsonl"
COUNTERS = {EPOCHS_FILE: ("epoch", "step"), STEPS_FILE: ("step",)}  # required keys of each record
MAX_FILE_BYTES = 2**30
MAX_TRUNCATED_BYTES = 2**16  # longest last line that counts as cut off by a kill


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Claim `workdir` for this run while the context is open; create it if needed.

    Writes the whole `config` to `config.json`, and does not touch the files of another run.

    Raises:
      UserError: the directory cannot be written, belongs to a run with other settings, which the
        error names, or is in use by a live run.
    """
    lock = FileLock(workdir / LOCK, timeout=0)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        _check_owner(workdir, config)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{workdir} is in use by a run that is alive; stop that, or give another "
                "--workdir; if none is alive, as when a machine on a network file system "
                f"vanished, remove {workdir / LOCK}"
            ) from error
        except NotImplementedError:  # the file system has no locks
            pass
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        with write_aside(workdir / "config.json") as aside:
            aside.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    with lock if lock.is_locked else contextlib.nullcontext():
        yield


def _check_owner(workdir: Path, config: ConfigDict) -> None:
    """Raise UserError if `workdir` is neither empty nor of a run with these settings."""
    path = workdir / "config.json"
    if path.exists():
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise UserError(f"{path} is not the config of a run: expected a JSON object")
        differences = differing_keys(config, theirs)
        if differences:
            raise UserError(
                f"{workdir} belongs to a run with other settings: {'; '.join(differences)}; "
                "give another --workdir"
            )
        return
    # A run killed while it starts leaves these; earlier versions named them without leading dots.
    leftovers = {partial_path(path).name, f"{path.name}.partial", LOCK}
    if any(other.name not in leftovers for other in workdir.iterdir()):
        raise UserError(
            f"{workdir} holds files but no config.json of a run; give an empty or new --workdir"
        )


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically; raise UserError if it cannot be written."""
    with writing(path), write_aside(path) as aside:
        aside.write_text(text)


def read_records(path: Path) -> list[Record]:
    """Read the records of a JSON Lines file; none if it is missing.

    A last line that was cut off by a kill is left out.

    Raises:
      UserError: the file cannot be read, or a line, which the error names, is not a record.
    """
    if not path.exists():
        return []
    *lines, rest = read_file(path, MAX_FILE_BYTES).split(b"\n")
    if not _is_truncated(rest):
        lines.append(rest)
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _is_truncated(rest: bytes) -> bool:
    """Return whether `rest`, after the last newline, is empty or only the beginning of a record."""
    rest = rest.rstrip(b"\0")  # zeros that some file systems leave after a power cut
    begins = rest.startswith(b"{") and rest.isascii() and len(rest) <= MAX_TRUNCATED_BYTES
    return not rest or (begins and not rest.endswith(b"}"))


def _parse(path: Path, number: int, line: bytes) -> Record:
    """Parse `line` as a record, a dict from names to numbers; raise UserError if it is not one."""
    name = f"{path}, line {number}"
    record = parse_json(line, name)
    try:
        if not isinstance(record, dict):
            raise ValueError(f"it is {short(record)}, expected an object")
        for key in COUNTERS.get(path.name, ("step",)):
            if key not in record:
                raise ValueError(f"it has no {key}")
            expect(record[key], key, int, 0, 2**53)
        for key, value in record.items():
            expect(value, key, (int, float), float("-inf"), float("inf"))
    except ValueError as error:
        raise UserError(f"{name} is not a record of a run: {error}") from error
    return record


def rewind_records(path: Path, step: int) -> list[Record]:
    """Remove the records after `step`, since a resumed run repeats those steps; return the others.

    A missing file is created. If `read_records` raises UserError, the file stays unchanged. Also
    raises UserError if the file cannot be written.
    """
    records = [record for record in read_records(path) if record["step"] <= step]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def append_record(path: Path, record: Record) -> None:
    """Append a record as one line and sync it to disk; raise UserError if that fails.

    Values that are not finite, such as a mean over no examples, are left out: JSON has no NaN.
    """
    finite = {key: value for key, value in record.items() if math.isfinite(value)}
    with writing(path), path.open("a") as file:
        file.write(json.dumps(finite) + "\n")
        file.flush()
        os.fsync(file.fileno())

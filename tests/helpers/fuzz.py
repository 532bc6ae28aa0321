"""Feed damaged and hostile files to every reader; each is read, or refused in one line.

    python tests/helpers/fuzz.py --inputs 2000 [--seed 0] [--only KIND]

An input is a valid file or folder with one of its files damaged. The reader has to return, or to
raise a UserError that names the input, within 10 seconds and 2 GB of memory. The same
`--seed` and `--first` bring back an input that failed, except where orbax chose the names of files.
"""

import argparse
import copy
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_kinds import KINDS

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.weights import model_directory, torch_names

MOST_SECONDS, MOST_BYTES = 10, 2 * 10**9


HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    100_000,
    10**9,
    10**400,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "../../x",
    "\x1b[31m\n",
    "x" * 10**6,
    [],
    [[[[1]]]],
    {},
    {"a": None},
    [1] * 10**5,
)
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one of the usual damages."""
    place = chance.randrange(len(data) + 1)
    length = chance.choice((1, 2, 4, 8, 64, 1024))
    changed = bytearray(data)
    how = chance.randrange(8)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + chance.randbytes(length) + data[place:]
    if how == 2:
        return data[:place] + data[place + length :]
    if how == 3:
        return data + chance.choice((b"\0", b"{", data, chance.randbytes(100)))
    if how == 4:
        changed[place : place + length] = chance.randbytes(length)
    elif how == 5:
        number, order = chance.choice(NUMBERS), chance.choice(("little", "big"))
        size = chance.choice((1, 2, 4, 8))
        masked = number & ((1 << 8 * size) - 1)
        changed[place : place + size] = masked.to_bytes(size, order)  # type: ignore[arg-type]
    elif how == 6:
        other = chance.randrange(len(data) + 1)
        changed[place : place + length] = data[other : other + length]
    else:
        for _ in range(chance.choice((1, 1, 2, 8))):
            if changed:
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) pairs of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places_of(value[key])
    return found


def damage_json(text: bytes, chance: random.Random) -> bytes:
    """JSON, or JSON lines, with a value replaced, removed, renamed or nested deeply."""
    lines = text.splitlines() if text.count(b"\n{") else [text]
    number = chance.randrange(len(lines))
    value = json.loads(lines[number])
    places = places_of(value)
    if chance.random() < 0.1:
        depth = chance.choice((50, 5000, 200_000))
        lines[number] = b"[" * depth + b"1" + b"]" * depth
    elif places:
        container, key = chance.choice(places)
        how = chance.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[chance.choice(("", "x", "__class__", "../x"))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(chance.choice(HOSTILE_VALUES))
        sys.set_int_max_str_digits(0)
        lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def damage_zip(data: bytes, chance: random.Random) -> bytes:
    """A zip file with one member damaged, compressed, doubled, renamed or blown up."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        victim = chance.choice(
            [*members, *[name for name in members if name.endswith(".pkl")] * len(members)]
        )
        how = chance.randrange(5)
        for name, content in members.items():
            kind, copies = zipfile.ZIP_STORED, 1
            if name == victim:
                if how == 0:
                    content, kind = content + bytes(10**8), zipfile.ZIP_DEFLATED
                elif how == 1:
                    copies = 2
                elif how == 2:
                    name = chance.choice(("../x", "archive/data/999", name.upper()))
                else:
                    content = damage_bytes(content, chance)
            for _ in range(copies):
                new.writestr(name, content, kind)
    return result.getvalue()


def replace_by_something_else(path: Path, chance: random.Random) -> None:
    """Put what is no regular file, or a file of another kind, at `path`."""
    path.unlink()
    how = chance.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to("/dev/zero")
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.symlink_to(path)
    elif how == 4:
        path.write_bytes(b"")
    else:
        path.write_bytes(chance.choice((b"\x89PNG\r\n\x1a\n", b"PK\3\4", b"\xff\xd8\xff", b"[]")))


def damage(path: Path, chance: random.Random) -> str:
    """Damage one file of an input; which one, and how."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    victim = chance.choice([file for file in files if file.name != ".lock"])
    if chance.random() < 0.06:
        replace_by_something_else(victim, chance)
        return f"{victim.name}: replaced"
    data, how = victim.read_bytes(), "bytes"
    change = damage_bytes
    if victim.suffix in (".json", ".jsonl") and chance.random() < 0.7:
        change, how = damage_json, "json"
    elif data.startswith(b"PK") and chance.random() < 0.6:
        change, how = damage_zip, "zip"
    victim.write_bytes(change(data, chance))
    return f"{victim.name}: {how}"


def attack(kind: str, seed: int, number: int, valid: Path, place: Path) -> str | None:
    """Make the input `number` of a kind at `place`, and read it.

    Args:
      kind: one of `KINDS`.
      seed: of the run.
      number: of the input.
      valid: a folder with a valid input of each kind.
      place: an empty folder.

    Returns:
      The line with which it is refused; None if it is read.

    Raises:
      AssertionError: the line does not name the input.
      Exception: whatever the reader raises that is not a UserError.
    """
    chance = random.Random(f"{kind} {seed} {number}")
    target = place / kind
    copy_of = shutil.copytree if (valid / kind).is_dir() else shutil.copy
    copy_of(valid / kind, target)
    done = damage(target, chance)
    try:
        KINDS[kind].read(target)
    except UserError as error:
        line = one_line(error)
        named = kind in line or (kind == "records" and "tfds:photos" in line)
        assert named, f"{done}: the line does not name the input: {line}"
        assert len(line) < 2000, f"{done}: the line has {len(line)} characters"
        return line
    return None


def make_valid(folder: Path, kinds: Sequence[str]) -> None:
    """Write a valid input of each kind, and see that it is read."""
    for kind in kinds:
        KINDS[kind].make(folder / kind)
        KINDS[kind].read(folder / kind)


def peak_memory() -> int:
    """The most bytes this process has held since the last `reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(connection: Connection, seed: int, valid: Path, scratch: Path) -> None:
    """Attack with the inputs asked for: (kind, number) to (line, failure, peak memory)."""
    # Finding its shapes takes most of the time of reading a small model.
    cached = functools.cache(torch_names.variable_shapes)
    model_directory.variable_shapes = torch_names.variable_shapes = cached  # type: ignore
    while True:
        kind, number = connection.recv()
        reset_peak_memory()
        place = Path(tempfile.mkdtemp(dir=scratch))
        line, failure = None, None
        try:
            line = attack(kind, seed, number, valid, place)
        except BaseException:
            failure = traceback.format_exc()
        connection.send((line, failure, peak_memory()))
        shutil.rmtree(place)


class Worker:
    """A process that attacks; it is started again after an input that it did not survive."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._fresh = True

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def attack(self, kind: str, number: int) -> tuple[str | None, str | None]:
        """The line with which the input is refused, and what went wrong."""
        self._connection.send((kind, number))
        seconds = MOST_SECONDS + 60 * self._fresh  # the first input waits for the imports
        self._fresh = False
        failure = f"no answer within {MOST_SECONDS} s"
        try:
            if self._connection.poll(seconds):
                line, failure, memory = self._connection.recv()
                if failure is None and memory > MOST_BYTES:
                    failure = f"{memory / 1e9:.1f} GB of memory"
                return line, failure
        except EOFError:
            self._process.join()
            failure = f"the process ended with status {self._process.exitcode}"
        self.stop()
        self._start()
        return None, failure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", choices=list(KINDS), help="one kind of input")
    parser.add_argument("--show", action="store_true", help="print every line")
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else list(KINDS)
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        valid, scratch = Path(temporary) / "valid", Path(temporary) / "scratch"
        valid.mkdir()
        scratch.mkdir()
        make_valid(valid, kinds)
        worker = Worker(arguments.seed, valid, scratch)
        try:
            for number in range(arguments.first, arguments.first + arguments.inputs):
                kind = kinds[number % len(kinds)]
                line, failure = worker.attack(kind, number)
                outcome = "failed" if failure else "refused" if line else "read"
                outcomes[kind, outcome] += 1
                if failure:
                    failures.append(number)
                    print(f"input {number}, {kind}: {failure}", flush=True)
                elif arguments.show:
                    print(f"input {number}, {kind}: {line or 'read'}", flush=True)
        finally:
            worker.stop()
    for kind in kinds:
        counts = {name: outcomes[kind, name] for name in ("refused", "read", "failed")}
        print(f"{kind:20}", *(f"{name} {count:4}" for name, count in counts.items()))
    print(f"{arguments.inputs} inputs, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

"""Feed damaged and hostile files to every reader: each must be read or rejected in one line.

    python tests/helpers/fuzz.py --inputs 2000 [--seed 0] [--only KIND]

An input is a valid file or folder with one damaged file. The reader must return, or raise a
UserError that names the input, within 10 seconds and 2 GB of memory. To reproduce a failed input,
pass the same `--seed`, and its number as `--first`. This does not work where orbax chose the names
of the files.
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

MAX_SECONDS, MAX_BYTES = 10, 2 * 10**9

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


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncate, insert, delete, append, overwrite, copy or flip bytes."""
    start = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 4, 8, 64, 1024))
    changed = bytearray(data)
    how = rng.randrange(8)
    if how == 0:
        return data[:start]
    if how == 1:
        return data[:start] + rng.randbytes(length) + data[start:]
    if how == 2:
        return data[:start] + data[start + length :]
    if how == 3:
        return data + rng.choice((b"\0", b"{", data, rng.randbytes(100)))
    if how == 4:
        changed[start : start + length] = rng.randbytes(length)
    elif how == 5:
        number, order = rng.choice(NUMBERS), rng.choice(("little", "big"))
        size = rng.choice((1, 2, 4, 8))
        masked = number & ((1 << 8 * size) - 1)
        changed[start : start + size] = masked.to_bytes(size, order)  # type: ignore[arg-type]
    elif how == 6:
        other = rng.randrange(len(data) + 1)
        changed[start : start + length] = data[other : other + length]
    else:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def json_items(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) pairs of a JSON value, at every depth."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    items = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            items += json_items(value[key])
    return items


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or deeply nest a value of JSON or of a line of JSON lines."""
    lines = text.splitlines() if text.count(b"\n{") else [text]
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    items = json_items(value)
    if rng.random() < 0.1:
        depth = rng.choice((50, 5000, 200_000))
        lines[number] = b"[" * depth + b"1" + b"]" * depth
    elif items:
        container, key = rng.choice(items)
        how = rng.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice(("", "x", "__class__", "../x"))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        sys.set_int_max_str_digits(0)
        lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Damage, duplicate, rename or inflate a member of a zip file."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        victim = rng.choice(
            [*members, *[name for name in members if name.endswith(".pkl")] * len(members)]
        )
        how = rng.randrange(5)
        for name, content in members.items():
            kind, copies = zipfile.ZIP_STORED, 1
            if name == victim:
                if how == 0:
                    content, kind = content + bytes(10**8), zipfile.ZIP_DEFLATED
                elif how == 1:
                    copies = 2
                elif how == 2:
                    name = rng.choice(("../x", "archive/data/999", name.upper()))
                else:
                    content = damage_bytes(content, rng)
            for _ in range(copies):
                new.writestr(name, content, kind)
    return result.getvalue()


def replace_file(path: Path, rng: random.Random) -> None:
    """Replace `path` by a special file, a folder, an empty file or a file of another format."""
    path.unlink()
    how = rng.randrange(6)
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
        path.write_bytes(rng.choice((b"\x89PNG\r\n\x1a\n", b"PK\3\4", b"\xff\xd8\xff", b"[]")))


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file of an input; returns the file's name and the kind of damage."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    victim = rng.choice([file for file in files if file.name != ".lock"])
    if rng.random() < 0.06:
        replace_file(victim, rng)
        return f"{victim.name}: replaced"
    data, how = victim.read_bytes(), "bytes"
    change = damage_bytes
    if victim.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        change, how = damage_json, "json"
    elif data.startswith(b"PK") and rng.random() < 0.6:
        change, how = damage_zip, "zip"
    victim.write_bytes(change(data, rng))
    return f"{victim.name}: {how}"


def attack(kind: str, seed: int, number: int, valid: Path, folder: Path) -> str | None:
    """Create an input in an empty folder and read it; returns the error line, None if readable."""
    rng = random.Random(f"{kind} {seed} {number}")
    target = folder / kind
    copy_input = shutil.copytree if (valid / kind).is_dir() else shutil.copy
    copy_input(valid / kind, target)
    done = damage(target, rng)
    try:
        KINDS[kind].read(target)
    except UserError as error:
        line = one_line(error)
        is_named = kind in line or (kind == "records" and "tfds:photos" in line)
        assert is_named, f"{done}: the line does not name the input: {line}"
        assert len(line) < 2000, f"{done}: the line has {len(line)} characters"
        return line
    return None


def make_valid(folder: Path, kinds: Sequence[str]) -> None:
    """Write a valid input of each kind and check that it can be read."""
    for kind in kinds:
        KINDS[kind].make(folder / kind)
        KINDS[kind].read(folder / kind)


def peak_memory() -> int:
    """Peak memory of this process since the last `reset_peak_memory`, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(connection: Connection, seed: int, valid: Path, scratch: Path) -> None:
    """Serve a `Worker`: receive (kind, number), send (error line, failure, peak memory)."""
    # Computing the shapes takes most of the time to read a small model.
    cached = functools.cache(torch_names.variable_shapes)
    model_directory.variable_shapes = torch_names.variable_shapes = cached  # type: ignore
    while True:
        kind, number = connection.recv()
        reset_peak_memory()
        folder = Path(tempfile.mkdtemp(dir=scratch))
        line, failure = None, None
        try:
            line = attack(kind, seed, number, valid, folder)
        except BaseException:
            failure = traceback.format_exc()
        connection.send((line, failure, peak_memory()))
        shutil.rmtree(folder)


class Worker:
    """A process that reads inputs; it is restarted after an input that kills or blocks it."""

    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=work, args=(child, *self._arguments), daemon=True)
        self._process.start()
        child.close()
        self._is_new = True

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def attack(self, kind: str, number: int) -> tuple[str | None, str | None]:
        """Read an input; returns the error line and the failure, each None if there was none."""
        self._connection.send((kind, number))
        seconds = MAX_SECONDS + 60 * self._is_new  # the first input waits for the imports
        self._is_new = False
        failure = f"no answer within {MAX_SECONDS} s"
        try:
            if self._connection.poll(seconds):
                line, failure, memory = self._connection.recv()
                if failure is None and memory > MAX_BYTES:
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

"""Feed damaged and hostile files to every reader: each must be read or rejected in one line.

    python tests/helpers/fuzz.py --inputs 2000 [--seed 0] [--only KIND]

An input is a valid file or folder with one damaged file. The reader must return, or raise a
UserError that names the input, within 2 GB of memory. A reader that needs more than 10 seconds ends
the program with a traceback of where it was. To reproduce an input, pass the same `--seed`, and its
number as `--first`. This does not work where orbax chose the names of the files.
"""

import argparse
import copy
import faulthandler
import functools
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_kinds import KINDS

from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.weights import model_directory, torch_names

MAX_SECONDS, MAX_BYTES = 10, 2 * 10**9

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 100_000, 10**9, 10**400, 1e308, float("nan"), float("-inf")),
    *("", "../../x", "\x1b[31m\n", "x" * 10**6),
    *([], [[[[1]]]], {}, {"a": None}, [1] * 10**5),
)
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncate, append, insert, delete, copy, overwrite or flip bytes."""
    start, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64, 1024))
    before, after, rest = data[:start], data[start:], data[start + length :]
    other, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 256**size
    bit = rng.randrange(8)
    return rng.choice(
        (
            before,
            data + rng.choice((b"\0", b"{", data, rng.randbytes(100))),
            before + rng.randbytes(length) + after,
            before + rest,
            before + data[other : other + length] + rest,
            before + rng.randbytes(length) + rest,
            before + number.to_bytes(size, rng.choice(("little", "big"))) + data[start + size :],
            before + bytes(byte ^ 1 << bit for byte in after[:1]) + after[1:],
        )
    )


def json_items(value: Any) -> list[tuple[Any, Any]]:
    """List all (container, key) pairs of a JSON value, at every depth."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    inner = [value[key] for key in keys if isinstance(value[key], dict | list)]
    return [(value, key) for key in keys] + [item for part in inner for item in json_items(part)]


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
        how = rng.choice(("remove", "rename", "replace", "replace"))
        if how == "remove":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[rng.choice(("", "x", "__class__", "../x"))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Damage, duplicate, rename or inflate a member of a zip file."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        pickles = [name for name in members if name.endswith(".pkl")]
        victim = rng.choice([*members, *pickles * len(members)])
        how = rng.choice(("inflate", "duplicate", "rename", "damage", "damage"))
        for name, content in members.items():
            if name != victim:
                new.writestr(name, content)
            elif how == "inflate":
                new.writestr(name, content + bytes(10**8), zipfile.ZIP_DEFLATED)
            elif how == "duplicate":
                new.writestr(name, content)
                new.writestr(name, content)
            elif how == "rename":
                new.writestr(rng.choice(("../x", "archive/data/999", name.upper())), content)
            else:
                new.writestr(name, damage_bytes(content, rng))
    return result.getvalue()


def replace_file(path: Path, rng: random.Random) -> None:
    """Replace `path` by a special file, a folder, an empty file or a file of another format."""
    path.unlink()
    rng.choice(
        (
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path),
            path.mkdir,
            path.touch,
            lambda: path.write_bytes(rng.choice((b"\x89PNG\r\n\x1a\n", b"PK\3\4", b"[]"))),
        )
    )()


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file of an input; return the file's name and the kind of damage."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    victim = rng.choice([file for file in files if file.name != ".lock"])
    if rng.random() < 0.06:
        replace_file(victim, rng)
        return f"{victim.name}: replaced"
    data, change = victim.read_bytes(), damage_bytes
    if victim.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        change = damage_json
    elif data.startswith(b"PK") and rng.random() < 0.6:
        change = damage_zip
    victim.write_bytes(change(data, rng))
    return f"{victim.name}: {change.__name__}"


def attack(kind: str, rng: random.Random, valid: Path, folder: Path) -> str | None:
    """Damage a copy of a valid input and read it; return the error line, or None if readable."""
    target = folder / kind
    copy_input = shutil.copytree if (valid / kind).is_dir() else shutil.copy
    copy_input(valid / kind, target)
    done = damage(target, rng)
    reset_peak_memory()
    line = None
    try:
        KINDS[kind].read(target)
    except UserError as error:
        line = one_line(error)
        is_named = kind in line or (kind == "records" and "tfds:photos" in line)
        assert is_named, f"{done}: the line does not name the input: {line}"
        assert len(line) < 2000, f"{done}: the line has {len(line)} characters"
    memory = peak_memory()
    assert memory < MAX_BYTES, f"{done}: {memory / 1e9:.1f} GB of memory"
    return line


def peak_memory() -> int:
    """Return the peak memory since the last `reset_peak_memory`, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


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
    sys.set_int_max_str_digits(0)  # to write the large numbers
    # Computing the shapes takes most of the time to read a small model.
    cached = functools.cache(torch_names.variable_shapes)
    model_directory.variable_shapes = torch_names.variable_shapes = cached  # type: ignore
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        valid = Path(temporary)
        for kind in kinds:
            KINDS[kind].make(valid / kind)
            KINDS[kind].read(valid / kind)
        for number in range(arguments.first, arguments.first + arguments.inputs):
            kind = kinds[number % len(kinds)]
            print(f"input {number}, {kind}", end="\r", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rng = random.Random(f"{kind} {arguments.seed} {number}")
                    line = attack(kind, rng, valid, Path(folder))
                    outcome = "refused" if line else "read"
                except Exception:
                    line, outcome = traceback.format_exc(), "failed"
            faulthandler.cancel_dump_traceback_later()
            outcomes[kind, outcome] += 1
            if arguments.show or outcome == "failed":
                print(f"input {number}, {kind}: {line or 'read'}", flush=True)
    for kind in kinds:
        counts = {name: outcomes[kind, name] for name in ("refused", "read", "failed")}
        print(f"{kind:20}", *(f"{name} {count:4}" for name, count in counts.items()))
    failures = sum(count for (_, outcome), count in outcomes.items() if outcome == "failed")
    print(f"{arguments.inputs} inputs, {failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

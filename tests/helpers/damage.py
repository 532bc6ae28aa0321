"""Simulated damage to files."""

import random
from collections.abc import Iterator
from pathlib import Path


def single_bit_flips(directory: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Flip one random bit in a file, yield its description and restore the file, `count` times."""
    rng = random.Random(seed)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        bit = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        yield f"bit {bit} of {file.relative_to(directory)}"
        file.write_bytes(content)

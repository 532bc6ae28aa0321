"""Files that a disk or a copy has damaged."""

import random
from collections.abc import Iterator
from pathlib import Path


def single_bit_flips(directory: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Flip one bit of one file, again and again, each time of the files as they were."""
    chance = random.Random(seed)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(count):
        file = chance.choice(files)
        content = file.read_bytes()
        bit = chance.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        yield f"bit {bit} of {file.relative_to(directory)}"
        file.write_bytes(content)

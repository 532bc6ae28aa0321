"""SHA-256 digests of a directory's files, stored in it in the format of `sha256sum`."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import read_file, write_aside

DIGESTS = "SHA256SUMS"
MOST_BYTES = 2**24

_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)", re.ASCII)


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(directory: Path) -> None:
    """Write the digests of all files below `directory`, which must not change afterwards."""
    files = set(directory.rglob("*")) - {directory / DIGESTS}
    paths = sorted(path for path in files if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(directory).as_posix()}\n" for path in paths]
    with write_aside(directory / DIGESTS) as aside:
        aside.write_text("".join(lines))


def read_digests(directory: Path) -> dict[str, str]:
    """Read a directory's digests, keyed by file name; empty if it has no `SHA256SUMS`.

    Raises UserError if a line has another format, or names a file outside the directory.
    """
    path = directory / DIGESTS
    if not path.exists():
        return {}
    digests = {}
    # Not splitlines(), which also splits at \r, a byte that damage can produce.
    for number, line in enumerate(read_file(path, MOST_BYTES).removesuffix(b"\n").split(b"\n"), 1):
        match = _LINE.fullmatch(line.decode(errors="replace"))
        name = PurePosixPath(match[2] if match else "/")
        if match is None or name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path} is damaged: line {number} is not that of a file")
        digests[match[2]] = match[1]
    return digests


def check_digests(directory: Path, digests: Mapping[str, str]) -> None:
    """Raise UserError unless each file in `digests` is in `directory`, readable and unchanged."""
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing, which {DIGESTS} lists")
        try:
            actual = sha256(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if actual != digest:
            raise UserError(
                f"{path} is not as it was written: its SHA-256 is not that in {DIGESTS}"
            )

"""Read regular files of limited size, and write files and directories whole or not at all."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from activemlp_jax.utils.errors import UserError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_file(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file of at most `most` bytes; raise UserError if it is not one."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= most:
                data = file.read(most + 1)
                size = len(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if size > most:
        raise UserError(f"{path} has {size:,} bytes, expected at most {most:,}")
    return data


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Report an OSError as a UserError that says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file; raise UserError for pipes and devices, which may block or never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # otherwise a pipe without a writer blocks
    kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode))
    if kind:
        os.close(descriptor)
        raise UserError(f"{path} is {kind}, expected a file")
    return descriptor


def partial_path(path: Path) -> Path:
    """Return the temporary path to which `path` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def previous_path(path: Path) -> Path:
    """Return the path at which a directory is kept while it is being replaced."""
    return path.with_name(f".{path.name}.previous")


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole directory if it exists; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that replaces `path` if nothing is raised.

    The file is synced to disk before it gets its final name, so neither a kill nor a power cut
    leaves half a file. A link at `path` is replaced, not followed. The partial file of a killed
    process is removed by the next process that writes to `path`.
    """
    aside = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(aside)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_directory_aside(directory: Path) -> Iterator[Path]:
    """Yield a new, empty directory that replaces `directory` if nothing is raised.

    A kill between the two renames leaves `.NAME.previous`, which the next write restores. A link
    at `directory` is replaced, not followed.
    """
    aside, previous = partial_path(directory), previous_path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _recover_directory(directory)
    _remove(aside)
    try:
        aside.mkdir()
        yield aside
        if os.path.lexists(directory):
            os.rename(directory, previous)
        os.rename(aside, directory)
        _remove(previous)
    finally:
        _recover_directory(directory)
        _remove(aside)


def _recover_directory(directory: Path) -> None:
    """Restore the previous directory if its replacement was interrupted, else remove it."""
    previous = previous_path(directory)
    if os.path.lexists(previous):
        if os.path.lexists(directory):
            _remove(previous)
        else:
            os.rename(previous, directory)


def check_output(output: Path) -> None:
    """Raise UserError unless the nearest existing parent of `output` is a writable folder."""
    parent = next(path for path in output.parents if os.path.lexists(path))
    if not parent.is_dir():
        raise UserError(f"{output} cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{output} cannot be written: there is no permission to write in {parent}")


def check_output_file(output: Path) -> str:
    """Return 'replaced' if `output` exists, else 'wrote'; raise UserError if it is not writable."""
    exists = output.exists()
    kind = KINDS.get(stat.S_IFMT(output.stat().st_mode)) if exists else None
    if kind:  # writing would replace a device by a file
        raise UserError(f"{output} cannot be written: it is {kind}")
    check_output(output)
    return "replaced" if exists else "wrote"

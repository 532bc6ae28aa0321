"""Files: read only what is a regular file of a sensible size; write whole or not at all."""

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
    """Read a regular file of at most `most` bytes.

    A pipe or a device could keep a reader waiting, or feed it, forever.

    Raises:
      UserError: the file is missing, unreadable, too large, or not a regular file.
    """
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


def _open_regular(path: str, flags: int) -> int:
    """Open a file for reading; raises UserError if it is not a regular one."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # else a pipe would wait for its writer
    kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode))
    if kind:
        os.close(descriptor)
        raise UserError(f"{path} is {kind}, expected a file")
    return descriptor


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


def previous_path(path: Path) -> Path:
    """Where a directory is kept while another takes its place."""
    return path.with_name(f".{path.name}.previous")


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give the path of a new file that takes the place of `path` if nothing is raised.

    The file is on the disk before it gets its name, so that neither a kill nor a power cut leaves
    half of it. A link at `path` is replaced, not followed. What a killed process left aside is
    removed by the next one that writes to `path`.

    Raises:
      OSError: the file cannot be written.
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
    """Give a new, empty directory that takes the place of `directory` if nothing is raised.

    A kill between the two renames leaves `.NAME.previous`, which `recover_directory` brings back.
    A link at `directory` is replaced, not followed.

    Raises:
      OSError: the directory cannot be written.
    """
    aside, previous = partial_path(directory), previous_path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(directory)
    _remove(aside)
    try:
        aside.mkdir()
        yield aside
        if os.path.lexists(directory):
            os.rename(directory, previous)
        os.rename(aside, directory)
        _remove(previous)
    finally:
        recover_directory(directory)
        if aside.exists():
            shutil.rmtree(aside)


def recover_directory(directory: Path) -> None:
    """Undo a replacement of `directory` that a kill cut short; remove what it left."""
    previous = previous_path(directory)
    if os.path.lexists(previous):
        if os.path.lexists(directory):
            _remove(previous)
        else:
            os.rename(previous, directory)


def check_output(output: Path) -> None:
    """Check that `output` can be written; folders above it that are missing are made later.

    Args:
      output: a file or folder to write.

    Raises:
      UserError: what is above it is not a folder, or nothing can be written into that.
    """
    there = next(place for place in output.parents if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{output} cannot be written: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{output} cannot be written: there is no permission to write in {there}")


def check_output_file(output: Path) -> str:
    """Check that the file `output` can be written; it may be there already.

    Returns:
      What will be done to it: 'wrote', or 'replaced' where it is there.

    Raises:
      UserError: as `check_output`, or it is a folder.
    """
    if output.exists():
        kind = KINDS.get(stat.S_IFMT(output.stat().st_mode))
        if kind:  # a device would be replaced by a file
            raise UserError(f"{output} cannot be written: it is {kind}")
    check_output(output)
    return "replaced" if output.exists() else "wrote"

"""Image files that a command line names: found, read ahead, and counted on the way."""

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import grain
import numpy as np
from rich.console import Console
from rich.progress import Progress

from activemlp_jax.data.decoding import (
    MOST_BYTES,
    BrokenImageError,
    decode,
    is_image_name,
    is_other_image_name,
    is_turned,
    read_image_file,
    warn,
)
from activemlp_jax.data.sources import no_images, warn_of_left_out
from activemlp_jax.utils.errors import UserError

STDIN = "-"
HANDFUL = 8  # images that need no progress bar
T = TypeVar("T")

IMAGES_HELP = (
    "files, folders with all in them, patterns in quotes such as 'a*/**/*.jpg', or - for an image "
    "from standard input"
)


class ImageFile(NamedTuple):
    """An image file that was asked for.

    `path` opens it, or is `STDIN`; `inside` is its place in the folder that was named, or just its
    name where none was.
    """

    path: str
    inside: Path


def find_images(paths: Sequence[str], leave_out: tuple[str, ...] = ()) -> list[ImageFile]:
    """Image files, in the order of `paths`; those of a folder or pattern in that of their names.

    Args:
      paths: of files, of folders, which are searched with the folders in them, each once,
        patterns, or `STDIN`. What is hidden in a folder is left alone. Images of kinds that are
        not read are left out, and counted on standard error.
      leave_out: ends of names that are not looked for in folders.

    Raises:
      UserError: there is no such file or folder, one has no images, or `STDIN` comes twice.
    """
    if paths.count(STDIN) > 1:
        raise UserError(f"{STDIN} is given {paths.count(STDIN)} times, but can be read only once")
    files: list[ImageFile] = []
    for path in paths:
        place = os.path.expanduser(path)
        if path == STDIN:
            files.append(ImageFile(STDIN, Path("stdin")))
        elif os.path.isdir(place):
            files += _expected(_walk(place, leave_out), path)
        elif os.path.exists(place):
            files.append(ImageFile(place, Path(Path(place).name)))
        elif glob.has_magic(place):
            if not glob.glob(place, recursive=True):
                raise UserError(f"no file or folder matches {path}")
            files += _expected(_match(place, leave_out), path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return files


def _looks_like_image(name: str, leave_out: tuple[str, ...]) -> bool:
    known = is_image_name(name) or is_other_image_name(name)
    return known and not name.startswith(".") and not name.endswith(leave_out)


def _walk(folder: str, leave_out: tuple[str, ...]) -> Iterator[ImageFile]:
    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()  # a link may lead to where one came from
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if _looks_like_image(name, leave_out):
                path = os.path.join(place, name)
                yield ImageFile(path, Path(os.path.relpath(path, folder)))


def _match(pattern: str, leave_out: tuple[str, ...]) -> Iterator[ImageFile]:
    """Those that match; of matching folders all, unless the pattern goes through them itself."""
    for path in sorted(glob.glob(pattern, recursive=True)):
        if not os.path.isdir(path):
            if _looks_like_image(os.path.basename(path), leave_out):
                yield ImageFile(path, Path(Path(path).name))
        elif "**" not in pattern:
            yield from _walk(path, leave_out)


def _expected(found: Iterable[ImageFile], path: str) -> list[ImageFile]:
    """Those that are read; the others are counted on standard error."""
    all_files = list(found)
    files = [file for file in all_files if is_image_name(file.path)]
    left_out = [str(file.inside) for file in all_files if not is_image_name(file.path)]
    if not files:
        raise no_images(path, left_out)
    warn_of_left_out(path, left_out)
    return files


def read_images(
    files: Sequence[ImageFile], prepare: Callable[[np.ndarray], np.ndarray], num_threads: int
) -> Iterator[tuple[ImageFile, np.ndarray | BrokenImageError]]:
    """The pixels of each file, in order, or why it has none.

    At the end, images whose EXIF orientation is not applied are counted on standard error.

    Args:
      files: to read.
      prepare: what is done to the pixels `[H, W, 3]` uint8.
      num_threads: that read ahead; 0 for none but the caller's.
    """

    def read(index: int) -> tuple[ImageFile, np.ndarray | BrokenImageError, bool]:
        file = files[index]
        try:
            data, name = (
                (_read_stdin(), "standard input")
                if file.path == STDIN
                else (read_image_file(file.path), file.path)
            )
            return file, prepare(decode(data, name)), is_turned(data)
        except BrokenImageError as error:
            return file, error, False

    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(16, 4 * num_threads)
    )
    iterator = iter(grain.MapDataset.range(len(files)).map(read).to_iter_dataset(options))
    turned = 0
    with contextlib.closing(iterator):
        for file, image, is_one_more in iterator:
            turned += is_one_more
            yield file, image
    if turned:
        images = f"{turned} images carry" if turned > 1 else "1 image carries"
        warn(f"{images} an EXIF orientation, which is not applied")


def _read_stdin() -> bytes:
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    if not data:
        raise BrokenImageError("standard input is empty")
    if len(data) > MOST_BYTES:
        raise BrokenImageError(f"standard input has more than {MOST_BYTES:,} bytes")
    return data


def unbroken(
    images: Iterable[tuple[ImageFile, np.ndarray | BrokenImageError]], broken: list[ImageFile]
) -> Iterator[tuple[ImageFile, np.ndarray]]:
    """Those that could be read; the others get a line on standard error, and go to `broken`."""
    for file, image in images:
        if isinstance(image, BrokenImageError):
            warn(f"skipped: {image}")
            broken.append(file)
        else:
            yield file, image


def watched(items: Iterable[T], total: int) -> Iterator[T]:
    """`items` with a bar on a terminal's standard error, if there are more than a `HANDFUL`."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(),
        console=console,
        transient=True,
        disable=not console.is_terminal or total <= HANDFUL,
        redirect_stdout=sys.stdout.isatty(),  # else what is piped on would end up on the terminal
    ) as progress:
        yield from progress.track(items, total, description="images")

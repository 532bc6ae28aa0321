"""Read images that are given in memory, or as files named on a command line."""

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from activemlp_jax.data.decoding import (
    MOST_BYTES,
    BrokenImageError,
    check_pixels,
    decode,
    describe_left_out,
    is_image_name,
    is_other_image_name,
    is_turned,
    pillow_errors,
    read_image_file,
    to_rgb,
    warn,
)
from activemlp_jax.data.folders import check_images
from activemlp_jax.utils.errors import UserError

EXPECTED = "a Pillow image, a uint8 array or the path of a file"
STDIN = "-"
MAX_WITHOUT_BAR = 8  # up to this many images are processed without a progress bar
T = TypeVar("T")

IMAGES_HELP = (
    "files, folders with all in them, patterns in quotes such as 'a*/**/*.jpg', or - for an image "
    "from standard input"
)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the pixels `[H, W, 3]` uint8 of an image file.

    Raises:
      BrokenImageError: if the file does not exist or is not an image.
    """
    return decode(read_image_file(path), str(path))


def list_images(images: Any) -> tuple[list[Any], bool]:
    """Return `images` as a list, and whether it is a single image; see `pixels_of` for the types.

    Raises:
      UserError: if `images` has another type or is empty.
    """
    if isinstance(images, Image.Image | str | os.PathLike):
        return [images], True
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        if images.ndim < 4:
            return [images], True
    if isinstance(images, bytes) or not isinstance(images, Iterable):
        raise UserError(f"images is a {type(images).__name__}, expected {EXPECTED}, or many")
    listed = list(images)
    if not listed:
        raise UserError("images is empty, expected at least one")
    return listed, False


def all_pixels(images: list[Any]) -> Iterator[np.ndarray]:
    """Yield the pixels of each image, read one at a time; see `pixels_of`."""
    for number, image in enumerate(images):
        yield pixels_of(image, f"image {number}" if len(images) > 1 else "the image")


def pixels_of(image: Any, name: str) -> np.ndarray:
    """Convert one image to pixels `[H, W, 3]` uint8 RGB, as `decode` does for files.

    Args:
      image: a Pillow image of any mode, an array `[H, W]` or `[H, W, 3]` uint8, or a path.
      name: name of the image in error messages.

    Raises:
      UserError: if the image has another type, dtype or shape, or cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        with pillow_errors(name, "image", BrokenImageError):
            check_pixels(image)
            return np.asarray(to_rgb(image))  # Pillow reads the pixels of a file only now
    if not hasattr(image, "__array__"):
        raise UserError(f"{name} is a {type(image).__name__}, expected {EXPECTED}")
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UserError(f"{name} has dtype {array.dtype}, expected uint8, values from 0 to 255")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or 0 in array.shape:
        raise UserError(f"{name} has shape {array.shape}, expected (H, W) or (H, W, 3)")
    return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1)


class ImageFile(NamedTuple):
    """An image file to read: the path to open or `STDIN`, and its path inside a searched folder."""

    path: str
    inside: Path  # only the file's name if no folder was searched


def find_images(paths: Sequence[str], leave_out: tuple[str, ...] = ()) -> list[ImageFile]:
    """Find image files, in the order of `paths`; those of a folder or pattern are sorted by name.

    Args:
      paths: files, folders, glob patterns, or `STDIN`. Folders are searched recursively, each
        once, without hidden files and folders. Images in formats that we cannot read are left
        out, and counted on standard error.
      leave_out: endings of file names to skip in folders and patterns.

    Raises:
      UserError: if a path does not exist or cannot be read, a folder or pattern has no images, or
        `STDIN` is given more than once.
    """
    if paths.count(STDIN) > 1:
        raise UserError(f"{STDIN} is given {paths.count(STDIN)} times, but can be read only once")
    files: list[ImageFile] = []
    for path in paths:
        expanded = os.path.expanduser(path)
        if path == STDIN:
            files.append(ImageFile(STDIN, Path("stdin")))
        elif os.path.isdir(expanded):
            files += _readable(_walk(expanded, leave_out), path)
        elif os.path.exists(expanded):
            files.append(ImageFile(expanded, Path(Path(expanded).name)))
        elif glob.has_magic(expanded):
            if not glob.glob(expanded, recursive=True):
                raise UserError(f"no file or folder matches {path}")
            files += _readable(_match(expanded, leave_out), path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return files


def _looks_like_image(name: str, leave_out: tuple[str, ...]) -> bool:
    known = is_image_name(name) or is_other_image_name(name)
    return known and not name.startswith(".") and not name.endswith(leave_out)


def _walk(folder: str, leave_out: tuple[str, ...]) -> Iterator[ImageFile]:
    def raise_user_error(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()  # links may form cycles
    for current, folders, names in os.walk(folder, onerror=raise_user_error, followlinks=True):
        if os.path.realpath(current) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(current))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if _looks_like_image(name, leave_out):
                path = os.path.join(current, name)
                yield ImageFile(path, Path(os.path.relpath(path, folder)))


def _match(pattern: str, leave_out: tuple[str, ...]) -> Iterator[ImageFile]:
    """Yield images that match `pattern`, and, unless it has `**`, images in matching folders."""
    for path in sorted(glob.glob(pattern, recursive=True)):
        if not os.path.isdir(path):
            if _looks_like_image(os.path.basename(path), leave_out):
                yield ImageFile(path, Path(Path(path).name))
        elif "**" not in pattern:
            yield from _walk(path, leave_out)


def _readable(candidates: Iterable[ImageFile], path: str) -> list[ImageFile]:
    """Keep the files in formats that we read; report the others on standard error."""
    all_files = list(candidates)
    files = [file for file in all_files if is_image_name(file.path)]
    left_out = [str(file.inside) for file in all_files if not is_image_name(file.path)]
    check_images(files, left_out, path)
    if left_out:
        warn(f"{path}: {describe_left_out(left_out)}")
    return files


def read_images(
    files: Sequence[ImageFile],
    prepare: Callable[[np.ndarray], np.ndarray],
    num_threads: int,
    broken: list[ImageFile],
) -> Iterator[tuple[ImageFile, np.ndarray]]:
    """Read and prepare image files, in order, with a progress bar on a terminal.

    Yield each file that can be read, with the result of `prepare` on its pixels `[H, W, 3]` uint8.
    Files that cannot be read are added to `broken` and reported on standard error. The number of
    images with an EXIF orientation is reported there too; the orientation is not applied.
    `num_threads` threads read ahead; with 0, the caller's thread reads.
    """
    import grain  # slow to import

    def read(index: int) -> tuple[np.ndarray | BrokenImageError, bool]:
        path = files[index].path
        try:
            data = _read_stdin() if path == STDIN else read_image_file(path)
            name = "standard input" if path == STDIN else path
            return prepare(decode(data, name)), is_turned(data)
        except BrokenImageError as error:
            return error, False

    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(16, 4 * num_threads)
    )
    iterator = iter(grain.MapDataset.range(len(files)).map(read).to_iter_dataset(options))
    num_turned = 0
    with contextlib.closing(iterator):
        for file, (image, turned) in zip(files, watched(iterator, len(files)), strict=True):
            num_turned += turned
            if isinstance(image, BrokenImageError):
                warn(f"skipped: {image}")
                broken.append(file)
            else:
                yield file, image
    if num_turned:
        images_carry = f"{num_turned} images carry" if num_turned > 1 else "1 image carries"
        warn(f"{images_carry} an EXIF orientation, which is not applied")


def _read_stdin() -> bytes:
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    if not data:
        raise BrokenImageError("standard input is empty")
    if len(data) > MOST_BYTES:
        raise BrokenImageError(f"standard input has more than {MOST_BYTES:,} bytes")
    return data


def watched(items: Iterable[T], total: int) -> Iterator[T]:
    """Yield `items`; show a progress bar on a terminal for more than `MAX_WITHOUT_BAR` items."""
    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns(),
        console=console,
        transient=True,
        disable=not console.is_terminal or total <= MAX_WITHOUT_BAR,
        redirect_stdout=sys.stdout.isatty(),  # piped output must not go to the terminal
    ) as progress:
        yield from progress.track(items, total, description="images")

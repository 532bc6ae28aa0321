"""Data sets by name."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from activemlp_jax.data.base import (
    EVALUATION_SPLITS,
    EncodedExample,
    Example,
    Source,
    decode_example,
)
from activemlp_jax.data.decoding import (
    IMAGE_SUFFIXES,
    BrokenImageError,
    describe_left_out,
    is_image_name,
    is_other_image_name,
    is_turned,
    read_image_file,
    warn,
    warn_of_turned,
)
from activemlp_jax.data.tfds_source import TfdsSource
from activemlp_jax.utils.errors import UserError

LOOKED_AT = 32  # images, evenly spread, whose orientation is looked at when a folder is opened


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of names; UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def sub_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in order, but for hidden ones."""
    return [
        entry.name
        for entry in scan(folder)
        if os.path.isdir(entry.path) and not entry.name.startswith(".")
    ]


def no_images(what: str, left_out: Sequence[str]) -> UserError:
    """The error for a folder `what` without images, but for those that are `left_out`."""
    expected = f"{what} has no images, expected {', '.join(IMAGE_SUFFIXES)}"
    return UserError(f"{expected}; {describe_left_out(left_out)}" if left_out else expected)


def scan_images(folder: Path) -> tuple[list[str], list[str]]:
    """The paths of a folder's images, and the names of those that are left out for their kind."""
    entries = scan(folder)
    left_out = [entry.name for entry in entries if is_other_image_name(entry.name)]
    return [entry.path for entry in entries if is_image_name(entry.name)], left_out


def warn_of_left_out(folder: object, names: Sequence[str]) -> None:
    """Say on standard error which images of a folder are left out, if any are."""
    if names:
        warn(f"{folder}: {describe_left_out(names)}")


def look_for_turned(files: Sequence[str], folder: Path) -> None:
    """Say on standard error if some of `files` have an EXIF orientation, by a look at a few."""
    indices = np.linspace(0, len(files) - 1, min(len(files), LOOKED_AT), dtype=int)
    turned = 0
    for index in indices:
        with contextlib.suppress(BrokenImageError):
            turned += is_turned(read_image_file(files[index]))
    warn_of_turned(turned, len(indices), folder)


class ArraySource:
    """A split held in memory: `images` `[N, H, W, 3]` uint8 and `labels` `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))


class FolderSource:
    """A folder of class folders of image files; classes and files in the order of their names.

    `files` has the path and the label of each.

    Raises:
      UserError: no such folder, fewer than two class folders, or one without images.
    """

    def __init__(self, folder: Path):
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {folder}")
        classes = sub_folders(folder)
        if len(classes) < 2:
            raise UserError(f"{folder} has {len(classes)} class folders, expected two or more")
        self.class_names = tuple(classes)
        self.files: list[tuple[str, int]] = []
        left_out: list[str] = []
        for label, name in enumerate(classes):
            files, others = scan_images(folder / name)
            if not files:
                raise no_images(f"the class folder {folder / name}", others)
            self.files += [(file, label) for file in files]
            left_out += [f"{name}/{other}" for other in others]
        warn_of_left_out(folder, left_out)
        look_for_turned([file for file, _ in self.files], folder)

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> EncodedExample:
        """The file at `index`; BrokenImageError if it cannot be read."""
        file, label = self.files[index]
        return EncodedExample(read_image_file(file), label, file)

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def open_digits(split: str | None) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, upscaled to 32x32.

    The first 1,437 in the data set's order are 'train'; the last 360, written by other people,
    are 'test'.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    split = split or "test"
    if split not in parts:
        raise UserError(f"digits has the splits {', '.join(parts)}, not {split!r}")
    digits = load_digits()
    grey = np.round(digits.images[parts[split]] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in grey]
    images = np.stack([np.asarray(image.convert("RGB")) for image in upscaled])
    return ArraySource(images, digits.target[parts[split]], tuple("0123456789"))


DISTINCT_PHOTOS = 64


@functools.cache
def _photo_files() -> tuple[bytes, ...]:
    from sklearn.datasets import load_sample_images  # slow to import

    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    files = []
    for number in range(DISTINCT_PHOTOS):
        photo = photos[number % len(photos)]
        top, left = rng.integers(photo.shape[0] - 374), rng.integers(photo.shape[1] - 499)
        file = io.BytesIO()
        cut = Image.fromarray(photo[top : top + 375, left : left + 500])
        cut.save(file, "JPEG", quality=98)
        files.append(file.getvalue())
    return tuple(files)


class PhotosSource:
    """`count` JPEG files of 500 x 375 pixels, held encoded; to measure reading and training by.

    They are `DISTINCT_PHOTOS` cuts of scikit-learn's two sample photographs, over and over,
    labelled 0 to 999 in turn: of the size and cost of ImageNet's, with nothing to learn.
    """

    def __init__(self, count: int):
        self._count = count
        self._files = _photo_files()
        self.class_names = tuple(map(str, range(1000)))

    def __len__(self) -> int:
        return self._count

    def encoded(self, index: int) -> EncodedExample:
        """The JPEG file at `index`."""
        return EncodedExample(self._files[index % DISTINCT_PHOTOS], index % 1000, f"photo {index}")

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def open_folder(root: Path, split: str | None) -> Source:
    """A folder of class folders, or one that has such a folder for every split.

    The latter is the layout of ImageNet: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}")
    if split:
        return FolderSource(root / split)
    present = [split for split in EVALUATION_SPLITS if os.path.isdir(root / split)]
    return FolderSource(root / present[0] if present else root)


def open_source(name: str, split: str | None = None) -> Source:
    """The split of a data set.

    Args:
      name: 'digits', 'folder:PATH', 'tfds:BUILDER', or 'photos:COUNT'.
      split: of those that the data set has; None for the one to evaluate on.

    Raises:
      UserError: an unknown name or split, or a data set that cannot be read.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        return open_digits(split)
    if kind == "folder" and rest:
        return open_folder(Path(rest).expanduser(), split)
    if kind == "tfds" and rest:
        return TfdsSource(rest, split)
    if kind == "photos" and re.fullmatch(r"[1-9]\d{0,9}", rest):
        return PhotosSource(int(rest))
    raise UserError(
        f"no data set {name!r}, expected digits, folder:PATH, tfds:NAME or photos:COUNT"
    )

"""Open image classification datasets by name."""

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from activemlp_jax.data.base import (
    EVALUATION_SPLITS,
    EncodedExample,
    EncodedSource,
    Example,
    Source,
    choose_split,
    evenly_spaced,
    open_by_name,
)
from activemlp_jax.data.decoding import (
    IMAGE_SUFFIXES,
    BrokenImageError,
    describe_left_out,
    is_image_name,
    is_other_image_name,
    read_image_file,
    warn,
    warn_of_orientation,
)
from activemlp_jax.data.tfds_source import TfdsSource
from activemlp_jax.utils.errors import UserError

CHECKED_IMAGES = 32  # evenly spaced images of a folder that are checked for an EXIF orientation
DISTINCT_PHOTOS = 64


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder, sorted by name; raise UserError if it cannot be read."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}")
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def subfolders(folder: Path) -> list[str]:
    """List the names of the subfolders of a folder, sorted and without hidden ones."""
    return [
        entry.name
        for entry in scan(folder)
        if os.path.isdir(entry.path) and not entry.name.startswith(".")
    ]


def scan_images(folder: Path, what: str) -> tuple[list[str], list[str]]:
    """List the paths of a folder's images, and the names of images in unsupported formats.

    Raise UserError if the folder cannot be read or if it has no images; `what` names it then.
    """
    entries = scan(folder)
    files = [entry.path for entry in entries if is_image_name(entry.name)]
    left_out = [entry.name for entry in entries if is_other_image_name(entry.name)]
    if not files:
        raise no_images(what, left_out)
    return files, left_out


def no_images(what: str, left_out: Sequence[str]) -> UserError:
    """Create the error for a folder, called `what`, that has no images in supported formats."""
    expected = f"{what} has no images, expected {', '.join(IMAGE_SUFFIXES)}"
    return UserError(f"{expected}; {describe_left_out(left_out)}" if left_out else expected)


def warn_of_left_out(folder: object, names: Sequence[str]) -> None:
    """Warn on stderr if a folder has images in unsupported formats, which `names` lists."""
    if names:
        warn(f"{folder}: {describe_left_out(names)}")


def warn_of_images(folder: Path, files: Sequence[str], left_out: Sequence[str]) -> None:
    """Warn on stderr about unsupported images, and EXIF orientations in a sample of `files`."""

    def readable() -> Iterator[bytes]:
        for index in evenly_spaced(len(files), CHECKED_IMAGES):
            with contextlib.suppress(BrokenImageError):
                yield read_image_file(files[index])

    warn_of_left_out(folder, left_out)
    warn_of_orientation(readable(), folder)


class ArraySource:
    """A dataset split in memory: `images` `[N, H, W, 3]` uint8 and `labels` `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))


def open_digits(split: str | None) -> Source:
    """Open the 1,797 handwritten digits that come with scikit-learn, upscaled to 32 x 32 pixels.

    The split 'train' has the first 1,437 digits in the dataset's order. The split 'test', the
    default, has the last 360, which were written by other people. Any other raises UserError.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    part = parts[choose_split(split, list(parts), "digits")]
    digits = load_digits()
    gray = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in gray]
    images = np.stack([np.asarray(image.convert("RGB")) for image in upscaled])
    return ArraySource(images, digits.target[part], tuple("0123456789"))


class FolderSource(EncodedSource):
    """A folder with one folder of image files per class; classes and files are sorted by name.

    `files` has the path and the label of each image.

    Raises:
      UserError: the folder does not exist, has fewer than two class folders, or has one without
        images.
    """

    def __init__(self, folder: Path):
        self.class_names = tuple(subfolders(folder))
        count = len(self.class_names)
        if count < 2:
            raise UserError(f"{folder} has {count} class folders, expected two or more")
        self.files: list[tuple[str, int]] = []
        left_out: list[str] = []
        for label, name in enumerate(self.class_names):
            files, others = scan_images(folder / name, f"the class folder {folder / name}")
            self.files += [(file, label) for file in files]
            left_out += [f"{name}/{other}" for other in others]
        warn_of_images(folder, [file for file, _ in self.files], left_out)

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> EncodedExample:
        """Read an image file; raise BrokenImageError if that fails."""
        file, label = self.files[index]
        return EncodedExample(read_image_file(file), label, file)


def open_folder(path: str, split: str | None) -> Source:
    """Open a folder of class folders, or `split` of a folder that has one such folder per split.

    The second layout is that of ImageNet: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`. Raises
    UserError as `FolderSource` does.
    """
    root = Path(path).expanduser()
    present = subfolders(root)
    split = split or next((name for name in EVALUATION_SPLITS if name in present), "")
    return FolderSource(root / split)


class PhotosSource(EncodedSource):
    """A source of JPEG files in memory, of 500 x 375 pixels, to time data loading and training.

    The files are `DISTINCT_PHOTOS` crops of scikit-learn's two sample photographs, repeated, with
    labels 0 to 999 in turn. They are about as large and as slow to decode as ImageNet images, but
    there is nothing to learn.

    Args:
      count: the number of examples.
    """

    def __init__(self, count: int):
        self._count = count
        self._files = _photo_files()
        self.class_names = tuple(map(str, range(1000)))

    def __len__(self) -> int:
        return self._count

    def encoded(self, index: int) -> EncodedExample:
        """Return the JPEG file of the example at `index`."""
        return EncodedExample(self._files[index % DISTINCT_PHOTOS], index % 1000, f"photo {index}")


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
        crop = Image.fromarray(photo[top : top + 375, left : left + 500])
        crop.save(file, "JPEG", quality=98)
        files.append(file.getvalue())
    return tuple(files)


def _open_photos(count: str, split: str | None) -> Source:
    del split  # all splits are the same
    if not re.fullmatch(r"[1-9]\d{0,9}", count):
        raise UserError(f"no data set 'photos:{count}', expected photos:COUNT, such as photos:1024")
    return PhotosSource(int(count))


OPENERS: dict[str, Callable[[str, str | None], Source]] = {
    "digits": lambda _, split: open_digits(split),
    "folder:PATH": open_folder,
    "tfds:NAME": TfdsSource,
    "photos:COUNT": _open_photos,
}


def open_source(name: str, split: str | None = None) -> Source:
    """Open a split of an image classification dataset.

    Args:
      name: the dataset, in one of the patterns listed in `OPENERS`, such as digits or folder:PATH.
      split: the name of a split; None for the evaluation split.

    Raises:
      UserError: the name or split is unknown, or the dataset cannot be read.
    """
    return open_by_name(name, split, OPENERS, "data set")

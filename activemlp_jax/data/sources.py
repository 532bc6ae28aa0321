"""Image classification datasets by name."""

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
    warn_of_orientation,
)
from activemlp_jax.data.tfds_source import TfdsSource
from activemlp_jax.utils.errors import UserError

CHECKED_IMAGES = 32  # evenly spaced images of a folder that are checked for an EXIF orientation


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name; raise UserError if it cannot be read."""
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


def no_images(what: str, left_out: Sequence[str]) -> UserError:
    """Create the error for a folder without images in supported formats.

    Args:
      what: the folder, as the message names it.
      left_out: names of its image files in unsupported formats.
    """
    expected = f"{what} has no images, expected {', '.join(IMAGE_SUFFIXES)}"
    return UserError(f"{expected}; {describe_left_out(left_out)}" if left_out else expected)


def scan_images(folder: Path) -> tuple[list[str], list[str]]:
    """List the paths of a folder's images, and the names of images in unsupported formats."""
    entries = scan(folder)
    left_out = [entry.name for entry in entries if is_other_image_name(entry.name)]
    return [entry.path for entry in entries if is_image_name(entry.name)], left_out


def warn_of_left_out(folder: object, names: Sequence[str]) -> None:
    """Warn on stderr about image files of a folder in unsupported formats, if there are any."""
    if names:
        warn(f"{folder}: {describe_left_out(names)}")


def check_orientation(files: Sequence[str], folder: Path) -> None:
    """Check some of `files` for an EXIF orientation, and warn on stderr if any has one."""
    indices = np.linspace(0, len(files) - 1, min(len(files), CHECKED_IMAGES), dtype=int)
    turned = 0
    for index in indices:
        with contextlib.suppress(BrokenImageError):
            turned += is_turned(read_image_file(files[index]))
    warn_of_orientation(turned, len(indices), folder)


class ArraySource:
    """A split in memory: `images` `[N, H, W, 3]` uint8 and `labels` `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))


class FolderSource:
    """A folder with one folder of image files per class; classes and files are sorted by name.

    `files` has the path and the label of each image.

    Raises:
      UserError: the folder does not exist, has fewer than two class folders, or has one without
        images.
    """

    def __init__(self, folder: Path):
        if not os.path.isdir(folder):
            raise UserError(f"there is no folder {folder}")
        classes = subfolders(folder)
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
        check_orientation([file for file, _ in self.files], folder)

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> EncodedExample:
        """Read the file at `index`; raise BrokenImageError if that fails."""
        file, label = self.files[index]
        return EncodedExample(read_image_file(file), label, file)

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def open_digits(split: str | None) -> Source:
    """Open the 1,797 handwritten digits that come with scikit-learn, upscaled to 32 x 32 pixels.

    The split 'train' has the first 1,437 digits in the dataset's order. The split 'test' has the
    last 360, which were written by other people.

    Args:
      split: 'train' or 'test'; None for 'test'.

    Raises:
      UserError: the split does not exist.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    split = split or "test"
    if split not in parts:
        raise UserError(f"digits has the splits {', '.join(parts)}, not {split!r}")
    digits = load_digits()
    gray = np.round(digits.images[parts[split]] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in gray]
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
        crop = Image.fromarray(photo[top : top + 375, left : left + 500])
        crop.save(file, "JPEG", quality=98)
        files.append(file.getvalue())
    return tuple(files)


class PhotosSource:
    """JPEG files of 500 x 375 pixels, kept encoded in memory, to measure data loading and training.

    They repeat `DISTINCT_PHOTOS` crops of scikit-learn's two sample photographs, with labels 0 to
    999 in turn. Their size and decoding cost are those of ImageNet images, but there is nothing to
    learn.

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
        """Return the JPEG file at `index`."""
        return EncodedExample(self._files[index % DISTINCT_PHOTOS], index % 1000, f"photo {index}")

    def __getitem__(self, index: int) -> Example:
        return decode_example(self.encoded(index))


def open_folder(root: Path, split: str | None) -> Source:
    """Open a folder of class folders, or a folder that has one such folder per split.

    The second layout is that of ImageNet: `train/n01440764/*.JPEG`, `val/n01440764/*.JPEG`.

    Args:
      root: the folder.
      split: the name of a split; None for the one to evaluate on, or if there are no splits.

    Raises:
      UserError: see `FolderSource`.
    """
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}")
    if split:
        return FolderSource(root / split)
    present = [split for split in EVALUATION_SPLITS if os.path.isdir(root / split)]
    return FolderSource(root / present[0] if present else root)


def open_source(name: str, split: str | None = None) -> Source:
    """Open a split of an image classification dataset.

    Args:
      name: 'digits', 'folder:PATH', 'tfds:NAME', or 'photos:COUNT'.
      split: the name of a split; None for the one to evaluate on.

    Raises:
      UserError: the name or split is unknown, or the dataset cannot be read.
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

"""Open datasets by name; a new source gets a line in `OPENERS` or `SCENE_OPENERS`."""

import functools
import io
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from PIL import Image

from activemlp_jax.data.base import Example, SceneSource, Source
from activemlp_jax.data.decoding import decode
from activemlp_jax.data.digits import DigitScenes, open_digits
from activemlp_jax.data.folders import open_ade20k, open_folder, open_scene_folder
from activemlp_jax.data.tfds_source import ADE20K_BUILDER, TfdsScenes, TfdsSource
from activemlp_jax.utils.errors import UserError

DISTINCT_PHOTOS = 64
T = TypeVar("T")


class PhotosSource:
    """A source of `count` JPEG files of 500 x 375 pixels, to time data loading and training.

    The files are kept in memory: `DISTINCT_PHOTOS` crops of scikit-learn's two sample photographs,
    repeated, with labels 0 to 999 in turn. They are about as large and as slow to decode as
    ImageNet images, but there is nothing to learn.
    """

    class_names = tuple(map(str, range(1000)))

    def __init__(self, count: int):
        self._count = count
        self.files = photo_files()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return Example(decode(self.files[index % DISTINCT_PHOTOS], f"photo {index}"), index % 1000)


@functools.cache
def photo_files() -> tuple[bytes, ...]:
    """Encode the `DISTINCT_PHOTOS` different photos as JPEG files."""
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


# The function that opens each kind of dataset, keyed by the pattern of its names. Its arguments are
# the part of the name after the colon, and the split; None means the evaluation split.
OPENERS: dict[str, Callable[[str, str | None], Source]] = {
    "digits": lambda _, split: open_digits(split),
    "folder:PATH": open_folder,
    "tfds:NAME": TfdsSource,
    "photos:COUNT": _open_photos,
}
SCENE_OPENERS: dict[str, Callable[[str, str | None], SceneSource]] = {
    "digit_scenes": lambda _, split: DigitScenes(split),
    "ade20k:PATH": open_ade20k,
    "folder:PATH": open_scene_folder,
    f"tfds:{ADE20K_BUILDER}": TfdsScenes,
}


def open_source(name: str, split: str | None = None) -> Source:
    """Open a split of an image classification dataset.

    Args:
      name: the dataset, in one of the patterns listed in `OPENERS`, such as digits or folder:PATH.
      split: the name of a split; None for the evaluation split.

    Raises:
      UserError: the name or split is unknown, or the dataset cannot be read.
    """
    return _open(name, split, OPENERS, "data set")


def open_scenes(name: str, split: str | None = None) -> SceneSource:
    """Open a split of a segmentation dataset, in one of the patterns listed in `SCENE_OPENERS`.

    The arguments and errors are those of `open_source`.
    """
    return _open(name, split, SCENE_OPENERS, "data set of scenes")


def _open(
    name: str, split: str | None, openers: Mapping[str, Callable[[str, str | None], T]], what: str
) -> T:
    kind, colon, rest = name.partition(":")
    for form, opener in openers.items():
        if form.partition(":")[:2] == (kind, colon) and bool(rest) == bool(colon):
            return opener(rest, split)
    *others, last = openers
    raise UserError(f"no {what} {name!r}, expected {', '.join(others)} or {last}")

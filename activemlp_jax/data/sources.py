"""Data sets as random access: an index gives one image and its label."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from activemlp_jax.errors import UserError


class Example(NamedTuple):
    """`image` `[H, W, 3]` uint8 RGB, `label` the index of its class."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """A data set split; `class_names[label]` is the name of a label."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


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


def open_digits(split: str) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, upscaled to 32x32.

    The first 1,437 in the data set's order are 'train'; the last 360, written by other people,
    are 'test'.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    digits = load_digits()
    part = {"train": slice(0, 1437), "test": slice(1437, 1797)}[split]
    grey = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in grey]
    images = np.stack([np.asarray(image.convert("RGB")) for image in upscaled])
    return ArraySource(images, digits.target[part], tuple("0123456789"))


SOURCES: dict[str, Callable[[str], Source]] = {"digits": open_digits}


def open_source(name: str, split: str) -> Source:
    """The split 'train' or 'test' of the data set `name`.

    Raises:
      UserError: an unknown name.
    """
    if name not in SOURCES:
        raise UserError(f"no data set {name!r}, expected one of {', '.join(sorted(SOURCES))}")
    return SOURCES[name](split)

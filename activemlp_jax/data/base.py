"""Interfaces for random access to images and their labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from activemlp_jax.utils.errors import UserError

# The evaluation split of a dataset is the first of these that it has.
EVALUATION_SPLITS = ("val", "validation", "test")
CHECKED_MASKS = 8  # number of evenly spaced masks to check when a dataset is opened


class Example(NamedTuple):
    """An image `[H, W, 3]` uint8 RGB and its label.

    The label is a class index or, in segmentation, a mask `[H, W]` uint8 with a class index per
    pixel.
    """

    image: np.ndarray
    label: Any


class Source(Protocol):
    """A split of a dataset; `class_names[label]` is the name of a label.

    `source[index]` raises BrokenImageError if the image cannot be read.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class SceneSource(Source, Protocol):
    """A split of a segmentation dataset; a label is a mask `[H, W]` uint8 as large as its image.

    Each pixel of a mask is a class index or `IGNORED`. `source[index]` raises BrokenImageError if
    the image cannot be read, and another UserError if the mask cannot be read.
    """

    def shape(self, index: int) -> tuple[int, int]:
        """Read an image's (height, width) from its header; raise BrokenImageError if that fails."""
        ...


def choose_split(split: str | None, splits: Sequence[str], name: object) -> str:
    """Return `split`, or the evaluation split if None; raise UserError if it is not in `splits`."""
    split = split or evaluation_split(splits, name)
    if split not in splits:
        raise UserError(f"{name} has the splits {', '.join(splits)}, not {split!r}")
    return split


def evaluation_split(splits: Sequence[str], name: object) -> str:
    """Return the evaluation split; raise UserError, which names the dataset, if there is none."""
    if split := next((split for split in EVALUATION_SPLITS if split in splits), None):
        return split
    raise UserError(f"{name} has the splits {', '.join(splits)}; choose one")


def evenly_spaced(length: int, count: int) -> list[int]:
    """Choose up to `count` evenly spaced indices, from 0 to `length` - 1."""
    return np.linspace(0, length - 1, min(length, count), dtype=int).tolist()


def check_same_classes(expected: tuple[str, ...], actual: tuple[str, ...], what: str) -> None:
    """Check that two datasets or models have the same class names in the same order.

    Raise UserError with the first difference; `what` names the owner of the `actual` names.
    """
    if len(expected) != len(actual):
        raise UserError(f"{what} has {len(actual)} classes, expected {len(expected)}")
    for label, (expected_name, name) in enumerate(zip(expected, actual, strict=True)):
        if expected_name != name:
            raise UserError(f"class {label} of {what} is {name!r}, expected {expected_name!r}")

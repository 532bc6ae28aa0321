"""Interfaces for random access to images and their labels; open datasets by name."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from activemlp_jax.data.decoding import decode
from activemlp_jax.utils.errors import UserError

# The evaluation split of a dataset is the first of these that it has.
EVALUATION_SPLITS = ("val", "validation", "test")

T = TypeVar("T")


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


class EncodedExample(NamedTuple):
    """The bytes of an image file, its class index, and the name that error messages use for it."""

    data: bytes
    label: int
    name: str


class EncodedSource(abc.ABC):
    """A `Source` that can also return the undecoded bytes of its images, as most sources can."""

    class_names: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def encoded(self, index: int) -> EncodedExample:
        """Read an example without decoding it; raise BrokenImageError if that fails."""

    def __getitem__(self, index: int) -> Example:
        example = self.encoded(index)
        return Example(decode(example.data, example.name), example.label)


def open_by_name(
    name: str, split: str | None, openers: Mapping[str, Callable[[str, str | None], T]], what: str
) -> T:
    """Open a dataset by a name such as 'digits' or 'folder:PATH'.

    Args:
      name: the name of the dataset.
      split: the name of a split; None for the evaluation split.
      openers: the function that opens each kind of dataset, keyed by the pattern of its names, such
        as 'folder:PATH'. Its arguments are the part of the name after the colon, and the split.
      what: what kind of dataset is opened, for the error message.

    Raises:
      UserError: the name matches none of the patterns, or the dataset cannot be opened.
    """
    kind, colon, rest = name.partition(":")
    for form, opener in openers.items():
        if form.partition(":")[:2] == (kind, colon) and bool(rest) == bool(colon):
            return opener(rest, split)
    *others, last = openers
    raise UserError(f"no {what} {name!r}, expected {', '.join(others)} or {last}")


def choose_split(split: str | None, splits: Sequence[str], name: object) -> str:
    """Return `split`, or the evaluation split if it is None; raise UserError if it is unknown."""
    split = split or evaluation_split(splits, name)
    if split not in splits:
        raise UserError(f"{name} has the splits {', '.join(splits)}, not {split!r}")
    return split


def evaluation_split(splits: Sequence[str], name: object) -> str:
    """Return the evaluation split; raise UserError, which names the dataset, if there is none."""
    for split in EVALUATION_SPLITS:
        if split in splits:
            return split
    raise UserError(f"{name} has the splits {', '.join(splits)}; choose one")


def evenly_spaced(length: int, count: int) -> list[int]:
    """Choose up to `count` evenly spaced indices, from 0 to `length` - 1."""
    return np.linspace(0, length - 1, min(length, count), dtype=int).tolist()


def check_same_classes(expected: tuple[str, ...], actual: tuple[str, ...], what: str) -> None:
    """Check that two datasets or models have the same class names in the same order.

    Args:
      expected: the expected class names, by label.
      actual: the class names to check, by label.
      what: the name, in the error message, of the dataset or model with the `actual` classes.

    Raises:
      UserError: the names differ; the message gives the first difference.
    """
    if len(expected) != len(actual):
        raise UserError(f"{what} has {len(actual)} classes, expected {len(expected)}")
    for label, (expected_name, name) in enumerate(zip(expected, actual, strict=True)):
        if expected_name != name:
            raise UserError(f"class {label} of {what} is {name!r}, expected {expected_name!r}")

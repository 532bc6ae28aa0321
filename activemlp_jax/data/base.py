"""Interfaces of datasets: random access to images and their labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from activemlp_jax.data.decoding import decode
from activemlp_jax.utils.errors import UserError

# The first of these splits that a dataset has is the default for evaluation.
EVALUATION_SPLITS = ("val", "validation", "test")


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
    """The bytes of an image file, its class index, and its name in error messages."""

    data: bytes
    label: int
    name: str


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A dataset that can also give its images as encoded files; most datasets can."""

    def encoded(self, index: int) -> EncodedExample:
        """Return the example at `index` without decoding it."""
        ...


def decode_example(example: EncodedExample) -> Example:
    """Decode `example`; raise BrokenImageError if its image cannot be read."""
    return Example(decode(example.data, example.name), example.label)


def evaluation_split(splits: Sequence[str], name: str) -> str:
    """Choose the split to evaluate on by default.

    Args:
      splits: the splits of the dataset.
      name: the dataset's name in the error message.

    Raises:
      UserError: none of `EVALUATION_SPLITS` is among them.
    """
    for split in EVALUATION_SPLITS:
        if split in splits:
            return split
    raise UserError(f"{name} has the splits {', '.join(splits)}; choose one")


def check_same_classes(expected: tuple[str, ...], actual: tuple[str, ...], what: str) -> None:
    """Check that two datasets or models have the same class names in the same order.

    Args:
      expected: the expected class names, by label.
      actual: the class names to check, by label.
      what: what has the `actual` classes, for the error message.

    Raises:
      UserError: the names differ; the message gives the first difference.
    """
    if len(expected) != len(actual):
        raise UserError(f"{what} has {len(actual)} classes, expected {len(expected)}")
    for label, (expected_name, name) in enumerate(zip(expected, actual, strict=True)):
        if expected_name != name:
            raise UserError(f"class {label} of {what} is {name!r}, expected {expected_name!r}")

"""What a data set is: random access to images and their labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from activemlp_jax.data.decoding import decode
from activemlp_jax.utils.errors import UserError

# A split by role, for those who name none: the first of these that a data set has.
EVALUATION_SPLITS = ("val", "validation", "test")


class Example(NamedTuple):
    """`image` `[H, W, 3]` uint8 RGB, `label` the index of its class.

    Of a scene, `label` is a mask `[H, W]` uint8: a class for every pixel.
    """

    image: np.ndarray
    label: Any


class Source(Protocol):
    """A data set split; `class_names[label]` is the name of a label.

    Reading an index raises BrokenImageError where its image cannot be read.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class EncodedExample(NamedTuple):
    """An image file's bytes, the index of its class, and what to call it in an error."""

    data: bytes
    label: int
    name: str


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A data set whose images are files of their own kind; most are."""

    def encoded(self, index: int) -> EncodedExample:
        """The example at `index`, not decoded."""
        ...


def decode_example(example: EncodedExample) -> Example:
    """`example` with its pixels; BrokenImageError if it has none."""
    return Example(decode(example.data, example.name), example.label)


def evaluation_split(splits: Sequence[str], name: str) -> str:
    """The split of the data set `name` to evaluate on; UserError if it has none for that."""
    for split in EVALUATION_SPLITS:
        if split in splits:
            return split
    raise UserError(f"{name} has the splits {', '.join(splits)}; choose one")


def check_same_classes(expected: tuple[str, ...], found: tuple[str, ...], what: str) -> None:
    """Raises UserError, naming the first difference, if `what` has other classes than expected."""
    if len(expected) != len(found):
        raise UserError(f"{what} has {len(found)} classes, expected {len(expected)}")
    for label, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            raise UserError(f"class {label} of {what} is {theirs!r}, expected {ours!r}")

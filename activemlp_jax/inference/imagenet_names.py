"""Readable class names, also for ImageNet datasets, which name their classes by WordNet IDs."""

import functools
from collections.abc import Sequence
from importlib import resources

FILE = "imagenet_classes.txt"


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Return the readable names of ImageNet's 1,000 classes, keyed by WordNet ID, in label order.

    Source: the classes of ILSVRC2012, which are sorted by ID; names from WordNet 3.0.
    """
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    lines = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return dict(pair for pair in lines)


def readable_names(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Choose a name to display for each of `count` classes.

    Args:
      class_names: names by label, or None if unknown. A WordNet ID of ImageNet becomes
        'name (ID)'; other names stay. Without names, 1,000 classes get ImageNet's names, and any
        other number of classes get their labels as names.
      count: number of classes.
    """
    imagenet = imagenet_names()
    if class_names:
        return tuple(
            f"{imagenet[name]} ({name})" if name in imagenet else name for name in class_names
        )
    return tuple(imagenet.values()) if count == len(imagenet) else tuple(map(str, range(count)))

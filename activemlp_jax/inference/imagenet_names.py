"""What to call a class, ImageNet's above all, whose data sets know them by numbers of WordNet."""

import functools
from collections.abc import Sequence
from importlib import resources

FILE = "imagenet_classes.txt"


@functools.cache
def imagenet_names() -> dict[str, str]:
    """A readable name by WordNet ID of ImageNet's 1,000 classes, in the order of the labels.

    Source: the classes of ILSVRC2012, which are in the order of their IDs; names from WordNet 3.0.
    """
    text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    lines = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return dict(pair for pair in lines)


def readable_names(class_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """What to call each of `count` classes.

    Args:
      class_names: by label; a WordNet ID of ImageNet becomes 'name (ID)', all else stays. None
        where they are unknown: a thousand classes are ImageNet's then, others get their numbers.
      count: of the classes.
    """
    known = imagenet_names()
    if class_names:
        return tuple(f"{known[name]} ({name})" if name in known else name for name in class_names)
    return tuple(known.values()) if count == len(known) else tuple(map(str, range(count)))

"""The command `predict` for classifiers: the most probable classes of image files."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from activemlp_jax.inference.classify import (
    ask,
    make_classifier,
    most_probable,
    probabilities,
)
from activemlp_jax.inference.imagenet_names import readable_names
from activemlp_jax.inference.images import ImageFile, read_images
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_card import ModelCard

TOP_CLASSES = 5  # per image

Record = dict[str, Any]


def plan(
    card: ModelCard, files: Sequence[ImageFile]
) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
    """Make the function that classifies the files in batches.

    Args:
      card: the card of the classifier.
      files: the images.

    Returns:
      A function from variables and a list to an iterator over records: for each file that can be
      read, its path as `image` and the most probable `classes`. It adds the other files to the
      list, and raises UserError for probabilities that are not finite.
    """
    classifier = make_classifier(card.model, card)
    names = readable_names(card.class_names, card.model.num_classes)

    def run(variables: Variables, broken: list[ImageFile]) -> Iterator[Record]:
        program = functools.partial(probabilities, classifier, variables)
        images = read_images(files, classifier.prepare, os.cpu_count() or 1, broken)
        for file, row in ask(program, images, len(files)):
            if not np.isfinite(row).all():
                raise UserError(f"the model gives {file.path} probabilities that are not finite")
            top = most_probable(row, names, TOP_CLASSES)
            yield {"image": file.path, "classes": [prediction._asdict() for prediction in top]}

    return run


def print_table(records: Iterator[Record]) -> None:
    """Print a table of the classes of each image, if there are any records."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for record in records:
        for rank, prediction in enumerate(record["classes"]):
            image = "" if rank else one_line(record["image"])
            percent = f"{100 * prediction['probability']:.1f}%"
            table.add_row(Text(image), Text(one_line(prediction["name"])), percent)
        table.add_section()
    if table.row_count:
        Console().print(table)

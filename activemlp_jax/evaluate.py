"""Accuracy of a model on a data set, each image counted once on any number of devices.

Examples:
  python -m activemlp_jax.evaluate runs/digits/model --data digits
  python -m activemlp_jax.evaluate models/active_tiny --data folder:/data/imagenet
  python -m activemlp_jax.evaluate models/active_tiny --data tfds:imagenet2012

On TPU pods, and under SLURM and Open MPI, the processes find each other; elsewhere the last four
options say how. The first of them prints.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from activemlp_jax.data.examples import check_same_classes
from activemlp_jax.data.pipeline import eval_batches
from activemlp_jax.data.sources import open_source
from activemlp_jax.errors import UserError, exit_with
from activemlp_jax.training import sharding
from activemlp_jax.training.command import HOST_OPTIONS
from activemlp_jax.training.evaluation import evaluate
from activemlp_jax.training.tasks import Classification
from activemlp_jax.weights.model_directory import read_card, read_weights

Metrics = dict[str, float]
HARDEST = 5


class Evaluation(NamedTuple):
    """What `evaluate_directory` finds.

    `metrics` has by kind of weights `accuracy` and `accuracy_top5` in percent, and `loss`, the mean
    cross entropy; `confusion` by kind the counts `[K, K]`, label by prediction; `class_names` the
    name of each label.
    """

    images: int
    metrics: dict[str, Metrics]
    confusion: dict[str, np.ndarray]
    class_names: tuple[str, ...]


def evaluate_directory(
    directory: str,
    data: str,
    split: str | None = None,
    *,
    batch_size: int = 128,
    image_size: int | None = None,
    num_threads: int | None = None,
) -> Evaluation:
    """Evaluate all weights of a model directory, in one pass over the data.

    Args:
      directory: a model directory.
      data: a data set, as `open_source` takes it.
      split: of the data set; None for the one to evaluate on.
      batch_size: images at a time over all devices, rounded up to a multiple of these.
      image_size: side in pixels; None for the size that the model was made for.
      num_threads: that read images on each host; None for one a processor.

    Raises:
      UserError: an unusable directory or data set, or classes that are not the model's.
    """
    card = read_card(directory)
    preprocessing = card.preprocessing
    try:
        if image_size is not None:
            preprocessing = dataclasses.replace(preprocessing, image_size=image_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    source = open_source(data, split)
    if card.class_names:
        check_same_classes(card.class_names, source.class_names, data)
    elif len(source.class_names) != card.model.num_classes:
        raise UserError(
            f"{data} has {len(source.class_names)} classes, but the model in {directory} has "
            f"{card.model.num_classes}"
        )

    mesh = sharding.make_mesh()
    task = Classification(card.model, preprocessing.mean, preprocessing.std)
    count = jax.jit(task.count, out_shardings=sharding.replicated(mesh))
    weights = {
        kind: sharding.put_everywhere(read_weights(directory, card, kind), mesh)
        for kind in card.kinds
    }
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    batches = eval_batches(
        source,
        preprocessing,
        batch_size,
        num_threads=(os.cpu_count() or 1) if num_threads is None else num_threads,
        **sharding.this_host(),
    )
    console = Console(stderr=True)
    shown = track(
        batches,
        "evaluating",
        total=-(-len(source) // batch_size),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with contextlib.closing(batches):
        sums = evaluate(count, weights, shown, mesh)
    return Evaluation(
        len(source),
        {kind: task.metrics(sums[kind]) for kind in card.kinds},
        {kind: np.asarray(sums[kind]["confusion"]) for kind in card.kinds},
        source.class_names,
    )


def hardest_classes(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The `HARDEST` classes of lowest accuracy among those with mistakes, the lowest first.

    Args:
      confusion: counts `[K, K]`, label by prediction.
      class_names: by label.

    Returns:
      For each `class`, its `accuracy` in percent, `images`, and the class it is most often
      `taken_for`.
    """
    confusion = np.asarray(confusion, np.float64)
    images = confusion.sum(1)
    right = np.diag(confusion)
    wrong = confusion - np.diag(right)
    accuracy = 100 * right / np.maximum(images, 1)
    labels = [label for label in np.argsort(accuracy, kind="stable") if wrong[label].any()]
    return [
        {
            "class": class_names[label],
            "accuracy": float(accuracy[label]),
            "images": int(images[label]),
            "taken_for": class_names[wrong[label].argmax()],
        }
        for label in labels[:HARDEST]
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m activemlp_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument(
        "--data", required=True, help="digits, folder:PATH (a folder of class folders), tfds:NAME"
    )
    parser.add_argument("--split", help="of the data set (the first of val, validation, test)")
    parser.add_argument("--batch-size", type=int, default=128, help="over all devices (128)")
    parser.add_argument("--image-size", type=int, help="side in pixels (the model's)")
    parser.add_argument("--num-threads", type=int, help="that read images (one a processor)")
    for name, parse, default, text in HOST_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, default=default, help=text)
    arguments = vars(parser.parse_args())
    hosts = sharding.Hosts(**{name: arguments.pop(name) for name, *_ in HOST_OPTIONS})
    try:
        for option, least in (("batch_size", 1), ("num_threads", 0)):
            value = arguments[option]
            if value is not None and value < least:
                name = option.replace("_", "-")
                raise UserError(f"--{name} is {value}, expected at least {least}")
        with sharding.connected(hosts):
            found = evaluate_directory(**arguments)
    except UserError as error:
        exit_with(error)
    if jax.process_index():
        return
    images = found.images
    record = {key: arguments[key] for key in ("directory", "data", "split")} | {"images": images}
    for kind, values in found.metrics.items():
        acc1, acc5 = values["accuracy"], values["accuracy_top5"]
        print(f"[{kind}] accuracy on {images} test images: {acc1:.3f}% acc@1 | {acc5:.3f}% acc@5")
        hardest = hardest_classes(found.confusion[kind], found.class_names)
        record[kind] = {"acc1": acc1, "acc5": acc5, "loss": values["loss"], "hardest": hardest}
    kind = next(iter(found.metrics))
    shown = [
        f"{row['class']} ({row['accuracy']:.1f}% of {row['images']}, else {row['taken_for']})"
        for row in record[kind]["hardest"]
    ]
    if shown:
        print(f"[{kind}] hardest classes: {', '.join(shown)}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

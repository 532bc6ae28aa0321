"""Accuracy of a model on a data set, each image counted once on any number of devices.

Of a classifier the share of images that it gets right, of a segmentation model mIoU, mAcc and aAcc.

Examples:
  python -m activemlp_jax.evaluate runs/digits/model --data digits
  python -m activemlp_jax.evaluate models/active_tiny --data folder:/data/imagenet
  python -m activemlp_jax.evaluate models/active_tiny --data tfds:imagenet2012
  python -m activemlp_jax.evaluate runs/digit_scenes/model --data digit_scenes
  python -m activemlp_jax.evaluate models/upernet_large --data ade20k:/data --multi-scale

On TPU pods, and under SLURM and Open MPI, the processes find each other; elsewhere the last four
options say how. The first of them prints.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.data.loader import eval_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.segmentation import round_up
from activemlp_jax.inference.tiling import MULTI_SCALE, make_protocol
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.tasks.evaluation import evaluate
from activemlp_jax.tasks.metrics import class_figures
from activemlp_jax.tasks.segmentation_evaluation import class_table, evaluate_scene_directory
from activemlp_jax.training.cli_flags import HOST_OPTIONS
from activemlp_jax.utils.errors import UserError, errors_in_one_line, one_line
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_freed_memory
from activemlp_jax.weights.model_directory import check_classes, read_card, read_weights

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
    """Evaluate all weights of the directory of a classifier, in one pass over the data.

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
    if not isinstance(card.model, ActiveMLP) or not isinstance(preprocessing, Preprocessing):
        raise UserError(f"{directory} has a segmentation model, expected a classifier")
    try:
        if image_size is not None:
            preprocessing = dataclasses.replace(preprocessing, image_size=image_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    source = open_source(data, split)
    check_classes(card, source.class_names, data)

    mesh = sharding.make_mesh()
    task = Classification(card.model, preprocessing)
    count = jax.jit(sharding.on_mesh(task.count, mesh), out_shardings=sharding.replicated(mesh))
    weights = {
        kind: sharding.put_everywhere(read_weights(directory, card, kind), mesh)
        for kind in card.kinds
    }
    batch_size = round_up(batch_size, mesh.size)
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
    parser = Parser(
        prog="python -m activemlp_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument(
        "--data",
        required=True,
        help="digits, folder:PATH (a folder of class folders), tfds:NAME; to segment: "
        "digit_scenes, ade20k:PATH, folder:PATH (images, annotations, classes.txt)",
    )
    parser.add_argument("--split", help="of the data set (the first of val, validation, test)")
    parser.add_argument(
        "--batch-size", type=int, help="over all devices (128; of scenes, one a device)"
    )
    parser.add_argument("--num-threads", type=int, help="that read images (one a processor)")
    classifiers = parser.add_argument_group("classifiers")
    classifiers.add_argument("--image-size", type=int, help="side in pixels (the model's)")
    scenes = parser.add_argument_group("segmentation models")
    scenes.add_argument(
        "--multi-scale",
        action="store_true",
        help=f"average over the scales {', '.join(map(str, MULTI_SCALE))}, each also flipped",
    )
    scenes.add_argument(
        "--slide",
        action="store_true",
        help="windows of the size trained on, every two thirds of it, in place of whole images",
    )
    scenes.add_argument(
        "--size-multiple",
        type=int,
        help="round the sides of resized images to multiples of so many pixels, such as 32: fewer "
        "sizes to compile, and not quite the published protocol",
    )
    for name, parse, default, text in HOST_OPTIONS:
        spelt = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))  # train.py's as well
        parser.add_argument(*spelt, type=parse, default=default, help=text)
    arguments = vars(parser.parse_args())
    keep_freed_memory()
    collect_garbage_rarely()
    hosts = sharding.Hosts(**{name: arguments.pop(name) for name, *_ in HOST_OPTIONS})
    with errors_in_one_line():
        check_numbers(arguments)
        with sharding.connected(hosts):
            is_segmentor = read_card(arguments["directory"]).is_segmentor
            report = _report_scenes if is_segmentor else _report_images
            lines = report(arguments)
        if jax.process_index() == 0:
            for line in lines:
                Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _common(arguments: dict[str, Any], *refused: str) -> dict[str, Any]:
    """The arguments that both kinds of models take; UserError for those that this one does not."""
    for name in refused:
        if arguments[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is not for the model in {arguments['directory']}")
    return {name: arguments[name] for name in ("directory", "data", "split", "num_threads")}


def _record(arguments: dict[str, Any], images: int) -> dict[str, Any]:
    return {name: arguments[name] for name in ("directory", "data", "split")} | {"images": images}


def _last_line(record: dict[str, Any]) -> str:
    """The record as JSON; UserError for a loss that is not finite."""
    return json_line(record, f"the evaluation of {record['directory']}")


def _report_scenes(arguments: dict[str, Any]) -> list[Any]:
    """What to print of a segmentation model."""
    common = _common(arguments, "image_size")
    protocol = make_protocol(
        arguments["multi_scale"], arguments["slide"], arguments["size_multiple"]
    )
    batch_size = arguments["batch_size"]
    found = evaluate_scene_directory(**common, protocol=protocol, batch_size=batch_size)
    record = _record(arguments, found.images) | {"protocol": found.protocol}
    lines: list[Any] = []
    for kind, values in found.metrics.items():
        lines.append(
            f"[{kind}] {found.images} test images, {found.protocol}: mIoU "
            f"{values['mean_iou']:.2f}% | mAcc {values['mean_accuracy']:.2f}% | aAcc "
            f"{values['pixel_accuracy']:.2f}%"
        )
        figures = class_figures(found.confusion[kind])
        record[kind] = values | {
            "iou": {
                name: None if np.isnan(iou) else float(iou)
                for name, iou in zip(found.class_names, figures["iou"], strict=True)
            }
        }
    first = next(iter(found.metrics))
    return [class_table(found.confusion[first], found.class_names), *lines, _last_line(record)]


def _report_images(arguments: dict[str, Any]) -> list[Any]:
    """What to print of a classifier."""
    common = _common(arguments, "multi_scale", "slide", "size_multiple")
    batch_size = arguments["batch_size"] or 128
    found = evaluate_directory(**common, batch_size=batch_size, image_size=arguments["image_size"])
    images, record = found.images, _record(arguments, found.images)
    lines = []
    for kind, values in found.metrics.items():
        acc1, acc5 = values["accuracy"], values["accuracy_top5"]
        among_five = f" | {acc5:.3f}% acc@5" if len(found.class_names) > 5 else ""
        lines.append(f"[{kind}] accuracy on {images} test images: {acc1:.3f}% acc@1{among_five}")
        hardest = hardest_classes(found.confusion[kind], found.class_names)
        accuracies = {"acc1": acc1} | ({"acc5": acc5} if among_five else {})
        record[kind] = {**accuracies, "loss": values["loss"], "hardest": hardest}
    kind = next(iter(found.metrics))
    shown = [
        f"{row['class']} ({row['accuracy']:.1f}% of {row['images']}, else {row['taken_for']})"
        for row in record[kind]["hardest"]
    ]
    if shown:
        lines.append(one_line(f"[{kind}] hardest classes: {', '.join(shown)}"))
    return [*lines, _last_line(record)]


if __name__ == "__main__":
    main()

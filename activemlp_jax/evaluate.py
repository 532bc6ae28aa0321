"""Evaluate a model on a dataset; each image counts once, on any number of devices.

Prints accuracy for a classifier, and mIoU, mAcc and aAcc for a segmentation model.

Examples:
  python -m activemlp_jax.evaluate runs/digits/model --data digits
  python -m activemlp_jax.evaluate models/active_tiny --data folder:/data/imagenet
  python -m activemlp_jax.evaluate models/active_tiny --data tfds:imagenet2012
  python -m activemlp_jax.evaluate runs/digit_scenes/model --data digit_scenes
  python -m activemlp_jax.evaluate models/upernet_large --data ade20k:/data --multi-scale

On TPU pods, and under SLURM and Open MPI, the processes find each other; elsewhere the last four
options tell them how. Only the first process prints.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console

from activemlp_jax.command_line import Parser, add_host_options, check_numbers
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.segmentation import round_up
from activemlp_jax.tasks.base import Sums, Task
from activemlp_jax.tasks.registry import TASKS, check_options, task_type
from activemlp_jax.utils.errors import errors_in_one_line
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import (
    collect_garbage_rarely,
    keep_compiled_programs,
    keep_freed_memory,
)
from activemlp_jax.weights.model_directory import check_classes, read_card, read_weights


class Evaluation(NamedTuple):
    """Result of `evaluate_directory`.

    `sums` has the task's sums over `images` images, keyed by kind of weights.
    """

    task: Task
    images: int
    sums: dict[str, Sums]
    class_names: tuple[str, ...]


def evaluate_directory(
    directory: str,
    data: str,
    split: str | None = None,
    *,
    batch_size: int | None = None,
    num_threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate all weights of a model directory in one pass over a dataset.

    Args:
      directory: model directory.
      data: dataset for the model's task.
      split: split of the dataset; None for the one to evaluate on.
      batch_size: images per batch over all devices, rounded up to a multiple of their number; None
        for the task's default.
      num_threads: threads that read images on each host; None for one per CPU.
      options: task-specific options of the command, keyed by name.

    Raises:
      UserError: the directory or dataset is unusable, an option is for another task, or the classes
        of the dataset are not the model's.
    """
    options = options or {}
    card = read_card(directory)
    task_class = task_type(card, directory)
    check_options(task_class, directory, "evaluate", options)
    task = task_class.from_card(card, options)
    source = task.open_data(data, split)
    check_classes(card, source.class_names, data)
    keep_compiled_programs()
    mesh = sharding.make_mesh()
    weights = {
        name: sharding.put_everywhere(read_weights(directory, card, name), mesh)
        for name in card.kinds
    }
    test = task.make_test(
        mesh,
        round_up(batch_size or task.default_batch_size, mesh.size),
        (os.cpu_count() or 1) if num_threads is None else num_threads,
        show_progress=True,
    )
    return Evaluation(task, len(source), test(weights, source), source.class_names)


def report(arguments: dict[str, Any]) -> list[Any]:
    """Evaluate; return what to print: the task's lines, then the record as one line of JSON."""
    common = ("directory", "data", "split", "batch_size", "num_threads")
    options = {name: value for name, value in arguments.items() if name not in common}
    result = evaluate_directory(**{name: arguments[name] for name in common}, options=options)
    lines, metrics = result.task.report(result.sums, result.images, result.class_names)
    record = {name: arguments[name] for name in ("directory", "data", "split")}
    record |= {"images": result.images, **metrics}
    return [*lines, json_line(record, f"the evaluation of {record['directory']}")]


def main() -> None:
    """Run the command line."""
    parser = Parser(
        prog="python -m activemlp_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="MODEL_DIR", help="from conversion or training")
    parser.add_argument(
        "--data",
        required=True,
        help="digits, folder:PATH (a folder of class folders), tfds:NAME; for segmentation: "
        "digit_scenes, ade20k:PATH, folder:PATH (images, annotations, classes.txt)",
    )
    parser.add_argument("--split", help="dataset split (the first of val, validation, test)")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="images at a time over all devices (128; for segmentation, one per device)",
    )
    parser.add_argument("--num-threads", type=int, help="threads that read images (one per CPU)")
    for task in TASKS.values():
        task.add_evaluate_options(parser.add_argument_group(f"{task.noun}s"))
    add_host_options(parser)
    arguments = vars(parser.parse_args())
    keep_freed_memory()
    collect_garbage_rarely()
    hosts = sharding.Hosts(*(arguments.pop(field) for field in sharding.Hosts._fields))
    with errors_in_one_line():
        check_numbers(arguments)
        with sharding.connected(hosts):
            lines = report(arguments)
        if jax.process_index() == 0:
            for line in lines:
                Console().print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

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
from typing import Any

from rich.console import Console

from activemlp_jax.command_line import Parser, add_host_options, check_numbers
from activemlp_jax.distributed import hosts, sharding
from activemlp_jax.inference.segment import round_up
from activemlp_jax.tasks.registry import TASKS, check_options, task_type
from activemlp_jax.utils.errors import errors_in_one_line
from activemlp_jax.utils.json_files import json_line
from activemlp_jax.utils.runtime import (
    collect_garbage_rarely,
    keep_compiled_programs,
    keep_freed_memory,
)
from activemlp_jax.weights.model_card import check_classes
from activemlp_jax.weights.model_directory import read_card, read_weights


def evaluate(arguments: dict[str, Any]) -> list[Any]:
    """Evaluate all weights of a model directory in one pass over a dataset.

    Returns:
      What to print: the task's lines, then the record as one line of JSON.
    """
    directory, data, split = (arguments[name] for name in ("directory", "data", "split"))
    batch_size, num_threads = arguments["batch_size"], arguments["num_threads"]
    card = read_card(directory)
    task_class = task_type(card, directory)
    check_options(task_class, directory, "evaluate", arguments)
    task = task_class.from_card(card, arguments)
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
    lines, metrics = task.report(test(weights, source), len(source), source.class_names)
    record = {"directory": directory, "data": data, "split": split, "images": len(source)}
    return [*lines, json_line(record | metrics, f"the evaluation of {directory}")]


def main() -> None:
    """Parse the command line and run the command."""
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
    host_options = hosts.Hosts(*(arguments.pop(field) for field in hosts.Hosts._fields))
    with errors_in_one_line():
        check_numbers(arguments)
        with hosts.connected(host_options):
            lines = evaluate(arguments)
        if hosts.is_first():
            for line in lines:
                Console().print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()

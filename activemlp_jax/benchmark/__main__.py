"""Count the cost of models, and time models, the operator and data loading.

Examples:
  python -m activemlp_jax.benchmark table --image-size 384
  python -m activemlp_jax.benchmark table --head upernet --image-size 512x2048
  python -m activemlp_jax.benchmark data --config configs/throughput.py --num-threads 2
  python -m activemlp_jax.benchmark model --model active_xtiny --compare
  python -m activemlp_jax.benchmark train --model active_xtiny --batch-size 16
  python -m activemlp_jax.benchmark op --csv results/op.csv
"""

import contextlib
import importlib
import os
import re
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from activemlp_jax.benchmark.programs import (
    TRAINING,
    Case,
    compile_copy,
    compile_forward,
    compile_matmul,
    compile_operator,
    compile_training,
    draw_cases,
    draw_inputs,
)
from activemlp_jax.benchmark.timing import (
    MIB,
    Contender,
    Measurement,
    Workload,
    say,
    summarize,
    table_lines,
    this_machine,
    time_in_turns,
    write_csv,
)
from activemlp_jax.command_line import Parser, check_numbers
from activemlp_jax.data.loader import train_batches
from activemlp_jax.models.active_mlp import create_model, list_models
from activemlp_jax.models.flops import count_cost
from activemlp_jax.models.segmentor import HEADS, create_segmentor
from activemlp_jax.tasks.registry import TASKS, open_data
from activemlp_jax.training.cli_flags import load_config
from activemlp_jax.training.config import check_config
from activemlp_jax.utils.errors import UserError, errors_in_one_line, install_command
from activemlp_jax.utils.files import check_output_file
from activemlp_jax.utils.runtime import collect_garbage_rarely, keep_freed_memory

PEER = Path("benchmarks", "torch_peer.py")


def parse_size(text: str) -> tuple[int, int]:
    """Parse '224' or '512x2048' as height and width; raise UserError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    if not match:
        raise UserError(f"--image-size is {text!r}, expected a side, or HEIGHTxWIDTH as 512x2048")
    height, width = int(match[1]), int(match[2] or match[1])
    for side in (height, width):
        check_numbers({"image_size": side})
    return height, width


def print_costs(options: Namespace) -> None:
    """Run the command `table`: print parameters and multiply-adds of models for one image."""
    height, width = parse_size(options.size)
    head = options.head
    classes = f"{head}, 150" if head else "1000"
    table = Table(title=f"one image of {height} x {width}, {classes} classes")
    table.add_column("backbone" if head else "model")
    # The published figures for segmentation also count batch norms and pooling.
    last = "with LayerNorms" if head else "as published"
    for heading in ("parameters", "GMACs conv+linear", f"GMACs {last}"):
        table.add_column(heading, justify="right")
    for name in options.model or list_models():
        model = create_segmentor(name, head) if head else create_model(name)
        cost = count_cost(model, height, width)
        macs = (f"{macs / 1e9:.3f}" for macs in (cost.macs, cost.published_macs))
        table.add_row(name, f"{cost.parameters:,}", *macs)
    Console().print(table)


def print_data_rate(options: Namespace) -> None:
    """Run the command `data`: print how many images per second the loader delivers."""
    config = load_config(options.config)
    changes = {
        "data.name": options.data,
        "data.num_threads": options.num_threads,
        "data.num_workers": options.num_workers,
        "batch_size": options.batch_size,
    }
    config.update_from_flattened_dict({k: v for k, v in changes.items() if v is not None})
    check_config(config)
    source, data, steps = open_data(config, config.data.train_split), config.data, options.steps
    flags.FLAGS.mark_as_parsed()  # for Grain's worker processes
    threads, workers = f"{data.num_threads} thread(s)", f"{data.num_workers} process(es)"
    say(
        f"{data.name}: {config.batch_size} images of {data.image_size} x {data.image_size} a "
        f"batch, {workers if data.num_workers else threads}"
    )
    rates = []
    for first in range(0, options.rounds * (steps + 1), steps + 1):
        transform, last = TASKS[config.task].transform, first + steps + 1
        batches = train_batches(source, transform, config, first_step=first, last_step=last)
        with contextlib.closing(batches):
            next(batches)  # threads and processes start
            began = time.perf_counter()
            for _ in batches:
                pass
            rates.append(steps * config.batch_size / (time.perf_counter() - began))
    say(
        f"{'this pipeline':14}{median(rates):9,.0f} images/s, median of {options.rounds} "
        f"({min(rates):,.0f} to {max(rates):,.0f})"
    )


def load_torch_peer() -> ModuleType:
    """Import and return `PEER`, PyTorch's side of the benchmarks; raise UserError if it cannot."""
    # By default JAX reserves three quarters of a GPU's memory, which PyTorch needs too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    places = (Path(__file__).parents[2], Path.cwd())
    path = next((place / PEER for place in places if (place / PEER).is_file()), None)
    if path is None:
        raise UserError(
            f"--compare needs {PEER} of this project's repository; there is none in {places[0]} or "
            "in the current folder"
        )
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"--compare needs PyTorch: {install_command('torch')}") from error
    sys.path.append(str(path.parent))
    peer = importlib.import_module(path.stem)
    peer.check_machine()
    return peer


def measure_all(
    groups: Iterable[tuple[str, Iterable[Contender]]], options: Namespace, in_milliseconds: bool
) -> None:
    """Time groups of contenders, print their figures, and update the CSV file after every group.

    Each group is a title and contenders. Iterating over the contenders compiles them; after that,
    they are timed in turns.
    """
    machine = this_machine(options.compare)
    file = Path(options.csv) if options.csv else None
    if file:
        check_output_file(file)
    others = f", torch {machine.torch_version}" if options.compare else ""
    say(
        f"{machine.device_kind}, {machine.cores} cores of {machine.cpu}; "
        f"jax {machine.jax_version}{others}"
    )
    measurements: list[Measurement] = []
    for title, compiling in groups:
        say(f"\n{title}")
        contenders = []
        for contender in compiling:
            what, implementation = contender.what, contender.implementation
            say(f"compiled {what}, {implementation}, in {contender.compile_seconds:.1f} s")
            contenders.append(contender)
        say(f"{options.rounds} rounds of {options.steps}, in turns")
        seconds = time_in_turns(contenders, options.steps, options.rounds)
        group = summarize(contenders, seconds)
        for line in table_lines(group, in_milliseconds):
            say(line)
        if statistics := jax.devices()[0].memory_stats():
            peak = statistics["peak_bytes_in_use"] / MIB
            say(f"JAX has held {peak:,.1f} MiB of the device at most so far")
        measurements += group
        if file:
            write_csv(file, measurements, machine)


def print_models(options: Namespace) -> None:
    """Run the command `model` or `train`: print images per second of classifiers."""
    peer = load_torch_peer() if options.compare else None
    images, size, dtype = options.batch_size, options.image_size, options.dtype
    names = options.model or list_models()
    for name in names:
        count_cost(create_model(name), size, size)  # raises for a wrong name or size

    def contenders(name: str) -> Iterator[Contender]:
        yield compile_matmul()
        workload = Workload(name, images, size, dtype)
        inputs, ours = draw_inputs(workload), []
        if options.parts:
            compiling = compile_training(workload, inputs, options.parts)
        else:
            compiling = compile_forward(workload, inputs)
        for contender in compiling:
            ours.append(contender)
            yield contender
        if peer:
            yield from peer.prepare_models(ours, inputs)

    setting = f"{images} images of {size} x {size} in {dtype}"
    groups = ((f"{name}, {setting}", contenders(name)) for name in names)
    measure_all(groups, options, in_milliseconds=False)


def print_operator(options: Namespace) -> None:
    """Run the command `op`: print milliseconds of each implementation of `sample_axis`."""
    peer = load_torch_peer() if options.compare else None

    def contenders(case: Case) -> Iterator[Contender]:
        yield compile_copy()
        yield from compile_operator(case)
        if peer:
            yield from peer.prepare_operators(case)

    cases = draw_cases(options.batch_size, options.image_size, options.dtype, options.deviation)
    groups = ((case.title(), contenders(case)) for case in cases)
    measure_all(groups, options, in_milliseconds=True)


def make_parser() -> Parser:
    """Make the parser; in the parsed options, `run` is the function of the chosen command."""
    parser = Parser(
        prog="python -m activemlp_jax.benchmark",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Callable[[Namespace], None], text: str, more: str = "") -> Parser:
        description = f"{text[0].upper()}{text[1:]}. {more}"
        command = commands.add_parser(name, help=text, description=description)
        command.set_defaults(run=run)
        return command

    table = add("table", print_costs, "parameters and multiply-adds, counted from shapes")
    table.add_argument(
        "--image-size", dest="size", default="224", help="side in pixels, or HEIGHTxWIDTH (224)"
    )
    table.add_argument(
        "--head", choices=list(HEADS), help="segmentation models with this head, not classifiers"
    )

    data = add("data", print_data_rate, "images per second of data loading alone")
    data.add_argument(
        "--config", required=True, metavar="FILE", help="such as configs/throughput.py"
    )
    data.add_argument("--data", metavar="NAME", help="dataset (the config's)")
    data.add_argument("--batch-size", type=int, help="images per batch (the config's)")
    data.add_argument("--num-threads", type=int, help="threads that read (the config's)")
    data.add_argument("--num-workers", type=int, help="processes instead of threads (the config's)")
    data.add_argument("--steps", type=int, default=5, help="batches per round (5)")
    data.add_argument("--rounds", type=int, default=3, help="rounds (3)")

    how = "JAX, with --compare in turns with PyTorch, next to a square matrix product."
    model = add("model", print_models, "images per second of classifiers, forward", how)
    model.set_defaults(parts=())
    text = "images per second of their gradient, and of the step that train.py runs"
    train = add("train", print_models, text, how)
    train.add_argument(
        "--only", dest="parts", nargs=1, choices=TRAINING, default=TRAINING, help="only one (both)"
    )
    for command in (table, model, train):
        command.add_argument(
            "--model", action="append", metavar="NAME", help="only this; may be repeated (all)"
        )

    text = "milliseconds of the operator in each of its implementations"
    operator = add("op", print_operator, text)
    operator.add_argument("--deviation", type=float, default=2.0, help="of offsets, in pixels (2)")
    for command, steps in ((model, 3), (train, 3), (operator, 10)):
        command.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
        command.add_argument("--image-size", type=int, default=224, help="side in pixels (224)")
        command.add_argument(
            "--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)"
        )
        command.add_argument("--rounds", type=int, default=5, help="rounds of each, in turns (5)")
        command.add_argument("--steps", type=int, default=steps, help=f"times per round ({steps})")
        command.add_argument(
            "--compare",
            action="store_true",
            help=f"with PyTorch; needs the extra torch and the repository's {PEER}",
        )
        command.add_argument("--csv", metavar="FILE", help="file to write the figures to")
    return parser


def main() -> None:
    """Parse the command line and run the command."""
    options = make_parser().parse_args()
    keep_freed_memory()  # as train.py does
    collect_garbage_rarely()
    with errors_in_one_line(getattr(options, "csv", None) or ""):
        try:
            check_numbers(vars(options))
            options.run(options)
        except ValueError as error:  # from an unknown model or a wrong image size
            raise UserError(str(error)) from error


if __name__ == "__main__":
    main()

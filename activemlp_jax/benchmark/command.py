"""The commands `model`, `train` and `op` of `python -m activemlp_jax.benchmark`."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from activemlp_jax.benchmark.measuring import (
    Contender,
    Measurement,
    Workload,
    summarize,
    this_machine,
    time_in_turns,
    write_csv,
)
from activemlp_jax.benchmark.operator import Case, compile_operator, draw_cases
from activemlp_jax.benchmark.programs import (
    TRAINING,
    compile_copy,
    compile_forward,
    compile_matmul,
    compile_training,
    draw_inputs,
)
from activemlp_jax.command_line import check_numbers
from activemlp_jax.models.active_mlp import create_model, list_models
from activemlp_jax.models.flops import count_cost
from activemlp_jax.utils.errors import UserError, install_command
from activemlp_jax.utils.files import check_output_file

MIB = 2**20

say: Callable[[str], None] = partial(print, flush=True)


def check_peer() -> None:
    """Raise UserError if PyTorch, its device or the compiler that it needs is missing."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"--compare needs PyTorch: {install_command('torch')}") from error
    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        raise UserError(f"--compare: JAX computes on {backend}, which this PyTorch does not")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compare: torch.compile needs a C++ compiler, and there is no {compiler}; install "
            "one, or name it by CXX"
        )


def figure_lines(measurements: Sequence[Measurement], in_milliseconds: bool) -> Iterator[str]:
    """Format measurements as lines of a table, 100 columns wide for names of usual length.

    Args:
      measurements: measurements of contenders that took turns.
      in_milliseconds: whether to show times instead of images per second.
    """
    unit = "ms" if in_milliseconds else "images/s"
    heading = ["", "", unit, "min to max", "GFLOP/s", "matmul", "GB/s", "copy", "to jax", "MiB"]
    rows = [[*heading, "compile s"]]
    for figures in measurements:
        rates = (
            figures.images_per_second,
            figures.images_per_second_min,
            figures.images_per_second_max,
        )
        if in_milliseconds and figures.batch_size:
            middle, high, low = (1e3 * figures.batch_size / (rate or 1) for rate in rates)
            digits = 3
        else:
            middle, low, high = (rate or 0.0 for rate in rates)
            digits = 1
        rows.append(
            [
                figures.what,
                figures.implementation,
                f"{middle:,.{digits}f}" if middle else "",
                f"{low:,.{digits}f} to {high:,.{digits}f}" if middle else "",
                f"{figures.gflops:,.1f}" if figures.gflops else "",
                f"{100 * figures.matmul_fraction:.1f}%" if figures.matmul_fraction else "",
                f"{figures.gigabytes:,.1f}" if figures.gigabytes else "",
                f"{100 * figures.copy_fraction:.1f}%" if figures.copy_fraction else "",
                f"{figures.ratio_to_jax:.2f}",
                f"{figures.memory_bytes / MIB:,.1f}" if figures.memory_bytes is not None else "",
                f"{figures.compile_seconds:.1f}",
            ]
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [
            cell.rjust(width) if number > 1 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)


class Options(NamedTuple):
    """Options that all commands share.

    The input is `batch_size` square images with sides of `image_size` pixels, in `dtype`. It is
    run in `rounds` of `steps` times each. `compare` adds PyTorch, and `csv` is the file to write,
    or None.
    """

    batch_size: int
    image_size: int
    dtype: str
    rounds: int
    steps: int
    compare: bool
    csv: str | None


def prepare(options: Options) -> None:
    """Check the options that all commands share, before any work.

    Raises:
      UserError: a number is out of range, or PyTorch cannot take part.
    """
    check_numbers(options._asdict())
    if options.compare:
        # By default JAX reserves three quarters of a GPU's memory, which PyTorch needs too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        check_peer()


def measure_all(
    groups: Iterable[tuple[str, Iterable[Contender]]], options: Options, in_milliseconds: bool
) -> None:
    """Time groups of contenders, print their figures, and update the CSV file after every group.

    Args:
      groups: titles and contenders; iterating compiles a group's contenders, which then take turns.
      options: how to measure.
      in_milliseconds: whether to print times instead of images per second.

    Raises:
      UserError: the CSV file cannot be written.
    """
    machine = this_machine(options.compare)
    measurements: list[Measurement] = []
    file = Path(options.csv) if options.csv else None
    if file:
        check_output_file(file)
    others = f", torch {machine.torch_version}" if options.compare else ""
    say(
        f"{machine.device_kind}, {machine.cores} cores of {machine.cpu}; "
        f"jax {machine.jax_version}{others}"
    )
    for title, compiling in groups:
        say(f"\n{title}")
        contenders = []
        for contender in compiling:
            say(
                f"compiled {contender.what}, {contender.implementation}, in "
                f"{contender.compile_seconds:.1f} s"
            )
            contenders.append(contender)
        say(f"{options.rounds} rounds of {options.steps}, in turns")
        seconds = time_in_turns(contenders, options.steps, options.rounds)
        group = summarize(contenders, seconds)
        for line in figure_lines(group, in_milliseconds):
            say(line)
        statistics = jax.devices()[0].memory_stats()
        if statistics:
            peak = statistics["peak_bytes_in_use"]
            say(f"JAX has held {peak / MIB:,.1f} MiB of the device at most so far")
        measurements += group
        if file:
            write_csv(file, measurements, machine)


def print_models(parts: Sequence[str], model: Sequence[str] | None, options: Options) -> None:
    """Run the command `model` or `train`: print images per second of classifiers.

    Args:
      parts: the parts of `TRAINING` to time; empty for the forward pass.
      model: names of the models; None for all.
      options: how to measure.

    Raises:
      UserError: an option is out of range, or PyTorch cannot take part.
      ValueError: a model is unknown or does not take images of this size.
    """
    prepare(options)
    size, dtype = options.image_size, options.dtype
    workloads = [Workload(name, options.batch_size, size, dtype) for name in model or list_models()]
    for workload in workloads:
        count_cost(create_model(workload.model), size, size)  # raises for a wrong name or size

    def contenders(workload: Workload) -> Iterator[Contender]:
        yield compile_matmul()
        inputs = draw_inputs(workload)
        ours = []
        compiling = (
            compile_training(workload, inputs, parts)
            if parts
            else compile_forward(workload, inputs)
        )
        for contender in compiling:
            ours.append(contender)
            yield contender
        if options.compare:
            from activemlp_jax.benchmark import torch_peer

            operators = torch_peer.list_operators(say)
            yield from torch_peer.prepare_models(ours, inputs, operators)

    title = f"{options.batch_size} images of {size} x {size} in {dtype}"
    groups = ((f"{workload.model}, {title}", contenders(workload)) for workload in workloads)
    measure_all(groups, options, in_milliseconds=False)


def print_operator(deviation: float, options: Options) -> None:
    """Run the command `op`: print milliseconds of each implementation of `sample_axis`.

    Args:
      deviation: standard deviation of the offsets, in pixels.
      options: how to measure.

    Raises:
      UserError: an option is out of range, or PyTorch cannot take part.
      ValueError: the model does not take images of this size.
    """
    prepare(options)
    check_numbers({"deviation": deviation})
    deform_conv2d = None
    if options.compare:
        from activemlp_jax.benchmark import torch_peer

        deform_conv2d = torch_peer.find_deform_conv2d(say)

    def contenders(case: Case) -> Iterator[Contender]:
        yield compile_copy()
        yield from compile_operator(case, say)
        if options.compare:
            yield from torch_peer.prepare_operators(case, deform_conv2d)

    cases = draw_cases(options.batch_size, options.image_size, options.dtype, deviation)
    groups = ((case.title(), contenders(case)) for case in cases)
    measure_all(groups, options, in_milliseconds=True)


def add_commands(commands: Any) -> None:
    """Add `model`, `train` and `op` to argparse's subparsers `commands`."""
    how = "JAX, with --compare in turns with PyTorch, next to a square matrix product"
    for name, text in (
        ("model", "images per second of classifiers, forward"),
        ("train", "images per second of their gradient, and of the step that train.py runs"),
        ("op", "milliseconds of the operator in each of its implementations"),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        if name != "op":
            description += f" {how}."
        command = commands.add_parser(name, help=text, description=description)
        if name == "op":
            command.add_argument(
                "--deviation", type=float, default=2.0, help="of the offsets, in pixels (2)"
            )
        else:
            command.add_argument(
                "--model", action="append", metavar="NAME", help="only this; may be repeated (all)"
            )
        if name == "train":
            command.add_argument("--only", choices=TRAINING, help="only one of them (both)")
        command.add_argument("--batch-size", type=int, default=8, help="images at a time (8)")
        command.add_argument("--image-size", type=int, default=224, help="side in pixels (224)")
        command.add_argument(
            "--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)"
        )
        command.add_argument("--rounds", type=int, default=5, help="rounds of each, in turns (5)")
        steps = 10 if name == "op" else 3
        command.add_argument("--steps", type=int, default=steps, help=f"times per round ({steps})")
        command.add_argument(
            "--compare", action="store_true", help="with PyTorch, which needs the extra torch"
        )
        command.add_argument("--csv", metavar="FILE", help="file to write the figures to")


def run(command: str, arguments: dict[str, Any]) -> None:
    """Run one of the commands of `add_commands`, with its options keyed by name."""
    not_shared = ("model", "only", "deviation")
    own_options = {name: arguments.pop(name) for name in not_shared if name in arguments}
    options = Options(**arguments)
    if command == "op":
        print_operator(options=options, **own_options)
    else:
        only = own_options.pop("only", None)
        parts = ((only,) if only else TRAINING) if command == "train" else ()
        print_models(parts, options=options, **own_options)

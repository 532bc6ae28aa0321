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
    summarise,
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
    """Raises UserError if PyTorch, or what it compiles with, is not here."""
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
    """A table of a group's figures, in 100 columns where names are as long as usual.

    Args:
      measurements: of contenders that took turns.
      in_milliseconds: whether times are told in place of images a second.
    """
    unit = "ms" if in_milliseconds else "images/s"
    heading = ["", "", unit, "min to max", "GFLOP/s", "matmul", "GB/s", "copy", "to jax", "MiB"]
    rows = [[*heading, "compile s"]]
    for found in measurements:
        rates = (
            found.images_per_second,
            found.images_per_second_min,
            found.images_per_second_max,
        )
        if in_milliseconds and found.batch_size:
            middle, high, low = (1e3 * found.batch_size / (rate or 1) for rate in rates)
            digits = 3
        else:
            middle, low, high = (rate or 0.0 for rate in rates)
            digits = 1
        rows.append(
            [
                found.what,
                found.implementation,
                f"{middle:,.{digits}f}" if middle else "",
                f"{low:,.{digits}f} to {high:,.{digits}f}" if middle else "",
                f"{found.gflops:,.1f}" if found.gflops else "",
                f"{100 * found.matmul_fraction:.1f}%" if found.matmul_fraction else "",
                f"{found.gigabytes:,.1f}" if found.gigabytes else "",
                f"{100 * found.copy_fraction:.1f}%" if found.copy_fraction else "",
                f"{found.ratio_to_jax:.2f}",
                f"{found.memory_bytes / MIB:,.1f}" if found.memory_bytes is not None else "",
                f"{found.compile_seconds:.1f}",
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
    """What all commands take: of the work, and how it is measured.

    `batch_size` images, square, of `image_size` pixels, in `dtype`; `rounds` of `steps` times
    each; `compare` with PyTorch; `csv` is the file to write, or None.
    """

    batch_size: int
    image_size: int
    dtype: str
    rounds: int
    steps: int
    compare: bool
    csv: str | None


def prepare(options: Options) -> None:
    """What all commands check before any work.

    Raises:
      UserError: nothing to measure, or no peer to compare with.
    """
    check_numbers(options._asdict())
    if options.compare:
        # Else JAX would take three quarters of a GPU's memory from the peer.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        check_peer()


def measure_all(
    groups: Iterable[tuple[str, Iterable[Contender]]], options: Options, in_milliseconds: bool
) -> None:
    """Time groups of contenders, print their figures, and write them down after every group.

    Args:
      groups: titles, and contenders that are compiled as they are asked for and then take turns.
      options: how to measure.
      in_milliseconds: whether times are printed in place of images a second.

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
        found = summarise(contenders, time_in_turns(contenders, options.steps, options.rounds))
        for line in figure_lines(found, in_milliseconds):
            say(line)
        statistics = jax.devices()[0].memory_stats()
        if statistics:
            peak = statistics["peak_bytes_in_use"]
            say(f"JAX has held {peak / MIB:,.1f} MiB of the device at most so far")
        measurements += found
        if file:
            write_csv(file, measurements, machine)


def print_models(whats: Sequence[str], model: Sequence[str] | None, options: Options) -> None:
    """The commands `model` and `train`: images a second of classifiers.

    Args:
      whats: out of `TRAINING`, or nothing, for the forward pass.
      model: their names, or None for all.
      options: how to measure.

    Raises:
      UserError: options that cannot work.
      ValueError: an unknown model, or images that it does not take.
    """
    prepare(options)
    size, dtype = options.image_size, options.dtype
    workloads = [Workload(name, options.batch_size, size, dtype) for name in model or list_models()]
    for workload in workloads:
        count_cost(create_model(workload.model), size, size)  # refuses what is wrong

    def contenders(workload: Workload) -> Iterator[Contender]:
        yield compile_matmul()
        inputs = draw_inputs(workload)
        ours = []
        compiling = (
            compile_training(workload, inputs, whats)
            if whats
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
    """The command `op`: milliseconds of `sample_axis` by each implementation.

    Args:
      deviation: standard deviation of the offsets, in pixels.
      options: how to measure.

    Raises:
      UserError: options that cannot work.
      ValueError: images that the model does not take.
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
    of_models = "JAX, with --compare in turns with PyTorch, against a square matrix product"
    for name, text in (
        ("model", "images a second of classifiers, forward"),
        ("train", "images a second of their gradient, and of the step that train.py runs"),
        ("op", "milliseconds of the operator, by each of its implementations"),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        if name != "op":
            description += f" {of_models}."
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
            command.add_argument("--only", choices=TRAINING, help="not the other (both)")
        command.add_argument("--batch-size", type=int, default=8, help="images (8)")
        command.add_argument("--image-size", type=int, default=224, help="side in pixels (224)")
        command.add_argument(
            "--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)"
        )
        command.add_argument("--rounds", type=int, default=5, help="of each, in turns (5)")
        steps = 10 if name == "op" else 3
        command.add_argument("--steps", type=int, default=steps, help=f"times a round ({steps})")
        command.add_argument(
            "--compare", action="store_true", help="with PyTorch, which needs the extra torch"
        )
        command.add_argument("--csv", metavar="FILE", help="to write the figures to")


def run(command: str, arguments: dict[str, Any]) -> None:
    """One of the commands that `add_commands` adds, with its options by name."""
    own = ("model", "only", "deviation")
    of_one = {name: arguments.pop(name) for name in own if name in arguments}
    options = Options(**arguments)
    if command == "op":
        print_operator(options=options, **of_one)
    else:
        only = of_one.pop("only", None)
        whats = ((only,) if only else TRAINING) if command == "train" else ()
        print_models(whats, options=options, **of_one)

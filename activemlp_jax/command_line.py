"""Command lines with argparse: one-line errors, common options, and limits on numbers."""

import argparse
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.utils.errors import UserError, exit_with

# Lowest and highest value of each option, in every command that has it. Larger values would fill
# the memory, or start more threads than the system allows, before they fail.
LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 2**20),
    "classes": (2, 2**20),
    "deviation": (0, 10**6),
    "image_size": (MIN_IMAGE_SIDE, 2**14),
    "images": (1, 2**40),
    "num_threads": (0, 1024),
    "num_workers": (0, 1024),
    "opacity": (0, 1),
    "rounds": (1, 10**6),
    "size_multiple": (1, 2**14),
    "steps": (1, 10**6),
}
# Limits for numbers that must be more than 0, or less than 1.
ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        exit_with(f"{message}; --help lists the options")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise UserError if an option that is listed in `LIMITS` is not within its limits."""
    for name, limits in LIMITS.items():
        check_range(f"--{name.replace('_', '-')}", options.get(name), *limits)


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise UserError about `name` unless each number in `value` is from `low` to `high`."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not low <= number <= high:
            if number > high:
                expected = "less than 1" if high == BELOW_1 else f"at most {high:,}"
            else:
                expected = "more than 0" if low == ABOVE_0 else f"at least {low:,}"
            raise UserError(f"{name} is {value!r}, expected {expected}")


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `hosts.Hosts`, spelled with underscores or with hyphens."""
    group = parser.add_argument_group(
        "several processes", "SLURM, Open MPI and TPU pods need none of these options."
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="address of the first process"
    )
    group.add_argument("--num_processes", "--num-processes", type=int, help="number of processes")
    group.add_argument(
        "--process_id", "--process-id", type=int, help="number of this process, from 0"
    )
    group.add_argument(
        "--timeout", type=int, default=300, help="seconds to wait for the others to start (300)"
    )

"""Command lines with argparse: one-line errors, and limits on numeric options."""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.utils.errors import UserError, exit_with

# Lowest and highest value of each option, in every command that has it. Larger values would fill
# the memory, or start more threads than the system allows, before they fail.
LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 2**20),
    "deviation": (0, 10**6),
    "image_size": (MIN_IMAGE_SIDE, 2**14),
    "num_threads": (0, 1024),
    "num_workers": (0, 1024),
    "opacity": (0, 1),
    "rounds": (1, 10**6),
    "size_multiple": (1, 2**14),
    "steps": (1, 10**6),
}


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print one line to standard error and exit with status 2."""
        exit_with(f"{message}; --help lists the options")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Check the options that have limits in `LIMITS`.

    Args:
      options: values keyed by option name; None for an option that was not given.

    Raises:
      UserError: a number is not within its limits.
    """
    for name, (low, high) in LIMITS.items():
        value = options.get(name)
        if value is None or low <= value <= high:
            continue
        expected = f"at most {high:,}" if value > high else f"at least {low:,}"
        raise UserError(f"--{name.replace('_', '-')} is {value}, expected {expected}")

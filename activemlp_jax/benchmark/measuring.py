"""Timing in turns, and what follows from it: rates, ratios, and rows of a CSV file."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_aside

MATMUL, COPY = "matmul", "copy"  # what the rates of all else are fractions of
JAX = "jax"  # the first word of the implementations that peers are compared with


class Workload(NamedTuple):
    """A model, by its name, and what it is given.

    `batch_size` images, square, of `image_size` pixels, and the dtype of the computation,
    'float32' or 'bfloat16'. The matrix product and the copy have no images: both are 0.
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str


class Contender(NamedTuple):
    """Something to be timed, compiled and ready.

    `call` does it so many times and waits for the last. Contenders that do the same `what` are
    compared. One time takes `flops` floating point operations by the model's multiply-adds, and
    `memory` in bytes; it moves `traffic` bytes if each array is read or written once. None where
    these say nothing, or nobody counts it.
    """

    what: str
    implementation: str
    workload: Workload
    call: Callable[[int], None]
    flops: float | None
    memory: int | None
    compile_seconds: float
    traffic: float | None = None


class Measurement(NamedTuple):
    """One contender's figures: the columns of the CSV file, before those of the machine.

    Images a second are the median, the lowest and the highest of the rounds. `ratio_to_jax` is the
    rate over that of JAX at the same, by its fastest implementation. `gflops` and `gigabytes` are a
    second, and `matmul_fraction` and `copy_fraction` are their shares of the matrix product's and
    of the copy's; of the median all.
    """

    what: str
    model: str
    implementation: str
    batch_size: int | None
    image_size: int | None
    dtype: str
    images_per_second: float | None
    images_per_second_min: float | None
    images_per_second_max: float | None
    ratio_to_jax: float
    gflops: float | None
    matmul_fraction: float | None
    gigabytes: float | None
    copy_fraction: float | None
    memory_bytes: int | None
    compile_seconds: float


class Machine(NamedTuple):
    """Where and by what was measured: the rest of the columns."""

    device_kind: str
    cores: int
    cpu: str
    jax_version: str
    torch_version: str
    date: str


COLUMNS = (*Measurement._fields, *Machine._fields)


def this_machine(with_torch: bool) -> Machine:
    """The machine of this process, and PyTorch's version if it takes part."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return Machine(
        jax.devices()[0].device_kind,
        os.cpu_count() or 1,
        found[1] if found else platform.processor() or platform.machine(),
        jax.__version__,
        importlib.metadata.version("torch") if with_torch else "",
        datetime.date.today().isoformat(),
    )


def time_in_turns(contenders: Sequence[Contender], steps: int, rounds: int) -> list[list[float]]:
    """Seconds that one time takes: of each contender a figure a round.

    They take turns, so that what else the machine does meets all of them alike.

    Args:
      contenders: to be timed.
      steps: times a round.
      rounds: of each.
    """
    for contender in contenders:
        contender.call(1)  # threads and libraries that start late are not timed
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for found, contender in zip(seconds, contenders, strict=True):
            began = time.perf_counter()
            contender.call(steps)
            found.append((time.perf_counter() - began) / steps)
    return seconds


def summarise(
    contenders: Sequence[Contender], seconds: Sequence[Sequence[float]]
) -> list[Measurement]:
    """Rates, ratios and fractions of contenders that were timed in turns.

    Args:
      contenders: JAX among them for all that is done.
      seconds: as `time_in_turns` gives them.
    """
    typical = [median(found) for found in seconds]
    fastest: dict[str, float] = {}
    product = copy = None
    for contender, middle in zip(contenders, typical, strict=True):
        if contender.implementation.split()[0] == JAX:
            fastest[contender.what] = min(middle, fastest.get(contender.what, middle))
        if contender.what == MATMUL and contender.flops:
            product = contender.flops / middle
        if contender.what == COPY and contender.traffic:
            copy = contender.traffic / middle
    measurements = []
    for contender, middle, found in zip(contenders, typical, seconds, strict=True):
        workload = contender.workload
        flops = contender.flops / middle if contender.flops else None
        moved = contender.traffic / middle if contender.traffic else None

        def rate(time: float, images: int = workload.batch_size) -> float | None:
            return images / time if images else None

        measurements.append(
            Measurement(
                contender.what,
                workload.model,
                contender.implementation,
                workload.batch_size or None,
                workload.image_size or None,
                workload.dtype,
                rate(middle),
                rate(max(found)),
                rate(min(found)),
                fastest[contender.what] / middle,
                flops and flops / 1e9,
                flops and product and flops / product,
                moved and moved / 1e9,
                moved and copy and moved / copy,
                contender.memory,
                contender.compile_seconds,
            )
        )
    return measurements


def _cell(value: object) -> object:
    """Four digits are more than a measurement has."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_csv(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """A heading with `COLUMNS`, and a row a measurement; what is not known is empty.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with write_aside(path) as aside, aside.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_cell(value) for value in (*row, *machine)] for row in measurements)
    except OSError as error:
        raise UserError(f"--csv {path}: {error.strerror or error}") from error

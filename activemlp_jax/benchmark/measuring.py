"""Timing in turns, and its results: rates, ratios and rows of a CSV file."""

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

MATMUL, COPY = "matmul", "copy"  # contenders that the other rates are given as fractions of
JAX = "jax"  # first word of the implementations that the others are compared with


class Workload(NamedTuple):
    """A model and its input.

    `model` is a name. The input is `batch_size` square images with sides of `image_size` pixels;
    both are 0 for the matrix product and the copy. `dtype`, 'float32' or 'bfloat16', is that of
    the computation.
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str


class Contender(NamedTuple):
    """A compiled function to time.

    `call(n)` runs it n times and waits for the last run. Contenders with the same `what` are
    compared. One run takes `flops` floating-point operations, from the model's multiply-adds, and
    `memory` bytes; it moves `traffic` bytes if each array is read or written once. These are None
    if they are not counted or not meaningful.
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
    """Figures of one contender: the columns of the CSV file before those of the machine.

    The images per second are the median, the lowest and the highest of the rounds; all other rates
    are from the median. `ratio_to_jax` is the rate divided by that of JAX's fastest implementation
    of the same `what`. `gflops` and `gigabytes` are per second; `matmul_fraction` is `gflops`
    divided by that of the matrix product, and `copy_fraction` is `gigabytes` divided by that of the
    copy.
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
    """Machine, versions and date of a measurement: the rest of the columns."""

    device_kind: str
    cores: int
    cpu: str
    jax_version: str
    torch_version: str
    date: str


COLUMNS = (*Measurement._fields, *Machine._fields)


def this_machine(with_torch: bool) -> Machine:
    """Describe this machine, and PyTorch's version if `with_torch`."""
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        match = None
    return Machine(
        jax.devices()[0].device_kind,
        os.cpu_count() or 1,
        match[1] if match else platform.processor() or platform.machine(),
        jax.__version__,
        importlib.metadata.version("torch") if with_torch else "",
        datetime.date.today().isoformat(),
    )


def time_in_turns(contenders: Sequence[Contender], steps: int, rounds: int) -> list[list[float]]:
    """Time contenders in turns, so that other load on the machine affects all of them alike.

    Args:
      contenders: contenders to time.
      steps: runs per round.
      rounds: rounds of each contender.

    Returns:
      Seconds per run: for each contender, one figure per round.
    """
    for contender in contenders:
        contender.call(1)  # excludes threads and libraries that start late
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for times, contender in zip(seconds, contenders, strict=True):
            began = time.perf_counter()
            contender.call(steps)
            times.append((time.perf_counter() - began) / steps)
    return seconds


def summarize(
    contenders: Sequence[Contender], seconds: Sequence[Sequence[float]]
) -> list[Measurement]:
    """Compute rates, ratios and fractions of contenders that were timed in turns.

    Args:
      contenders: contenders, with at least one of JAX for each `what`.
      seconds: as `time_in_turns` returns them.
    """
    medians = [median(times) for times in seconds]
    fastest: dict[str, float] = {}
    product = copy = None
    for contender, middle in zip(contenders, medians, strict=True):
        if contender.implementation.split()[0] == JAX:
            fastest[contender.what] = min(middle, fastest.get(contender.what, middle))
        if contender.what == MATMUL and contender.flops:
            product = contender.flops / middle
        if contender.what == COPY and contender.traffic:
            copy = contender.traffic / middle
    measurements = []
    for contender, middle, times in zip(contenders, medians, seconds, strict=True):
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
                rate(max(times)),
                rate(min(times)),
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
    """Round to four digits, more than a measurement has."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write_csv(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """Write a heading with `COLUMNS` and one row per measurement; unknown values are empty.

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

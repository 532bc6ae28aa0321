"""Time functions in turns, and report the results as rates, ratios, a table and a CSV file."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_aside

MATMUL, COPY = "matmul", "copy"  # contenders whose rates are the reference for the other rates
JAX = "jax"  # first word of the names of JAX's implementations, the reference for the others
MIB = 2**20

say: Callable[[str], None] = partial(print, flush=True)  # compiling and timing take long


class Workload(NamedTuple):
    """A model and its input; both numbers are 0 for the matrix product and the copy."""

    model: str
    batch_size: int
    image_size: int  # side in pixels
    dtype: str  # of the computation, 'float32' or 'bfloat16'


class Contender(NamedTuple):
    """A compiled function to time. Numbers that are not counted or not meaningful are None."""

    what: str  # what it computes; contenders with the same value are compared
    implementation: str  # begins with the word `JAX` if it is JAX's
    workload: Workload
    call: Callable[[int], None]  # runs it the given number of times, and waits for the last run
    flops: float | None  # floating-point operations of a run, from the model's multiply-adds
    memory: int | None  # bytes that it needs
    compile_seconds: float
    traffic: float | None = None  # bytes that a run moves if each array is read or written once


class Measurement(NamedTuple):
    """Figures of one contender, in the CSV file's first columns; those of `Machine` follow.

    All rates are from the median of the rounds, except for the lowest and the highest.
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
    ratio_to_jax: float  # to the rate of JAX's fastest implementation of the same `what`
    gflops: float | None  # per second
    matmul_fraction: float | None  # of the GFLOP/s of the matrix product
    gigabytes: float | None  # per second
    copy_fraction: float | None  # of the GB/s of the copy
    memory_bytes: int | None
    compile_seconds: float


class Machine(NamedTuple):
    """Machine, package versions and date of a measurement, in the CSV file's last columns."""

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

    Returns the seconds per run: for each contender, one figure per round of `steps` runs.
    """
    for contender in contenders:
        contender.call(1)  # keeps the start of threads and libraries out of the timing
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
    """Compute rates from the `seconds` of `time_in_turns`; each `what` must have one by JAX."""
    timed = list(zip(contenders, seconds, map(median, seconds), strict=True))
    fastest: dict[str, float] = {}
    matmul_rate = copy_rate = None
    for contender, _, middle in timed:
        if contender.implementation.split()[0] == JAX:
            fastest[contender.what] = min(middle, fastest.get(contender.what, middle))
        if contender.what == MATMUL and contender.flops:
            matmul_rate = contender.flops / middle
        if contender.what == COPY and contender.traffic:
            copy_rate = contender.traffic / middle
    measurements = []
    for contender, times, middle in timed:
        name, images, size, dtype = contender.workload
        flops = contender.flops / middle if contender.flops else None
        moved = contender.traffic / middle if contender.traffic else None
        rates = [images / time if images else None for time in (middle, max(times), min(times))]
        measurements.append(
            Measurement(
                contender.what,
                name,
                contender.implementation,
                images or None,
                size or None,
                dtype,
                rates[0],
                rates[1],
                rates[2],
                fastest[contender.what] / middle,
                flops and flops / 1e9,
                flops and matmul_rate and flops / matmul_rate,
                moved and moved / 1e9,
                moved and copy_rate and moved / copy_rate,
                contender.memory,
                contender.compile_seconds,
            )
        )
    return measurements


def table_lines(measurements: Sequence[Measurement], in_milliseconds: bool) -> Iterator[str]:
    """Format measurements as lines of a table, 100 columns wide for names of usual length."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    unit, form = ("ms", ",.3f") if in_milliseconds else ("images/s", ",.1f")
    heading = ["", "", unit, "min to max", "GFLOP/s", "matmul", "GB/s", "copy", "to jax", "MiB"]
    rows = [[*heading, "compile s"]]
    for row in measurements:
        shown = [row.images_per_second, row.images_per_second_min, row.images_per_second_max]
        if in_milliseconds:
            times = [1e3 * (row.batch_size or 0) / rate if rate else None for rate in shown]
            shown = [times[0], times[2], times[1]]
        rows.append(
            [
                row.what,
                row.implementation,
                cell(shown[0], form),
                " to ".join(cell(value, form) for value in shown[1:] if value),
                cell(row.gflops, ",.1f"),
                cell(row.matmul_fraction, ".1%"),
                cell(row.gigabytes, ",.1f"),
                cell(row.copy_fraction, ".1%"),
                cell(row.ratio_to_jax, ".2f"),
                cell(row.memory_bytes and row.memory_bytes / MIB, ",.1f"),
                cell(row.compile_seconds, ".1f"),
            ]
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = [text.rjust(width) for text, width in zip(cells, widths, strict=True)]
        names = [text.ljust(width) for text, width in zip(cells[:2], widths, strict=False)]
        yield "  ".join([*names, *padded[2:]])


def write_csv(path: Path, measurements: Sequence[Measurement], machine: Machine) -> None:
    """Write a heading with `COLUMNS` and one row per measurement; unknown values are empty."""

    def cell(value: object) -> object:  # four digits, finer than any measurement
        return float(f"{value:.4g}") if isinstance(value, float) else value

    try:
        with write_aside(path) as aside, aside.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([cell(value) for value in (*row, *machine)] for row in measurements)
    except OSError as error:
        raise UserError(f"--csv {path}: {error.strerror or error}") from error

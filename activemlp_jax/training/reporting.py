"""Reporting: a progress bar or log lines, JSON lines, TensorBoard and other trackers."""

import datetime
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from activemlp_jax.training.schedules import peak_learning_rate, warmup_steps
from activemlp_jax.training.workdir import EPOCHS_FILE, STEPS_FILE, append_record
from activemlp_jax.utils.hardware import GIB, memory_in_use
from activemlp_jax.utils.types import Record

Tracker = Callable[[Record], None]

# Keys of an epoch's record that are printed, with their formats.
EPOCH_FORMATS = (
    ("epoch", "epoch {:>3}"),
    ("train_loss", "loss {:.4f}"),
    ("test_loss", "test loss {:.4f}"),
    ("test_accuracy", "accuracy {:.2f}%"),
    ("test_mean_iou", "mIoU {:.2f}%"),
    ("ema_test_accuracy", "averaged weights {:.2f}%"),
    ("ema_test_mean_iou", "averaged weights {:.2f}%"),
    ("images_per_second", "{:.0f} images/s"),
)

SKIPPED_BY_TRACE = 10  # steps, since the first ones include one-time work
MAX_LAG = 5.0  # percentage points; warn if the averaged weights score lower by more


def describe_length(config: ConfigDict, steps_per_epoch: int, steps: int) -> str:
    """Describe a run in a line such as '8 steps an epoch, 200 in all, learning rate up to 1.0e-04'.

    The line also warns of a warm-up that is longer than the run, and of a batch that is too large.
    """
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    number = f"{steps_per_epoch:,} step{'s' * (steps_per_epoch > 1)} an epoch"
    length = f"{number}, {steps:,} in all, learning rate up to {peak:.1e}"
    warmup = warmup_steps(config.optimizer, steps_per_epoch)
    if warmup > steps:
        length += f", but its warm-up takes {warmup:,} steps, more than the run"
    if steps_per_epoch == 1 and config.batch_size > 1:
        length += (
            f"; config.batch_size is {config.batch_size}, more than half of an epoch; lower it, "
            f"for example with --config.batch_size={max(1, config.batch_size // 4)}"
        )
    return length


def lagging_average(config: ConfigDict, record: Record, score: str, images: int) -> str | None:
    """Return a one-line warning if the averaged weights are far worse than those of the last step.

    `record` is that of the last test, with the metric `score` of both in percent. A difference of
    one image out of `images` is ignored.
    """
    raw, averaged = record[f"test_{score}"], record.get(f"ema_test_{score}", math.inf)
    if raw - averaged <= max(MAX_LAG, 100 / images):
        return None
    warmup = "" if config.ema_warmup else "set --config.ema_warmup=True, or "
    return (
        f"the averaged weights lag behind: {averaged:.2f}%, those of the last step {raw:.2f}%; "
        f"{warmup}lower config.ema_decay, which is {config.ema_decay}, or train for longer"
    )


class Work(NamedTuple):
    """The steps that a run has left and what each of them costs."""

    first_step: int  # number of steps already done
    last_step: int  # number of steps of the whole run
    epochs: int  # number of epochs of the whole run
    batch_size: int
    flops: float  # of a step
    peak_flops: float | None  # of all devices, per second; None if unknown


class Reporter:
    """Context manager that reports the steps and epochs of a run.

    Writes `metrics.jsonl`, `steps.jsonl` and, if configured, `tensorboard/` to `workdir`, which is
    None on hosts that do not report. After each logged step and each epoch, calls each of
    `trackers` with the record, a dict from names to numbers that includes `step`.
    """

    def __init__(
        self,
        workdir: Path | None,
        work: Work,
        config: ConfigDict,
        console: Console,
        trackers: Sequence[Tracker] = (),
    ):
        self._workdir, self._work, self._console = workdir, work, console
        self._every_steps = config.log_every_steps
        self._trackers = trackers if workdir else ()
        self._writer = None
        if config.tensorboard and workdir and work.first_step < work.last_step:
            from tensorboardX import SummaryWriter

            directory = str(workdir / "tensorboard")
            self._writer = SummaryWriter(directory, purge_step=work.first_step + 1)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or workdir is None,
        )
        self._task = self._progress.add_task(
            "", total=work.last_step, completed=work.first_step, epoch="-", metrics="-"
        )

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def start_epoch(self, epoch: int, first_step: int) -> None:
        """Start to measure the speed of `epoch`, which begins at `first_step`."""
        self._epoch, self._epoch_start = f"{epoch}/{self._work.epochs}", first_step
        self._started, self._steps = time.perf_counter(), 0
        self._progress.update(self._task, epoch=self._epoch)

    def images_per_second(self) -> float:
        """Return the average number of images per second since the epoch began."""
        return self._steps * self._work.batch_size / (time.perf_counter() - self._started)

    def step(self, step: int, metrics: Record) -> None:
        """Report the `metrics` of a step, with its `loss`; `step` is the number of steps done."""
        self._steps += 1
        rate, work = self.images_per_second(), self._work
        record = {"step": step, **metrics, "images_per_second": round(rate, 1)}
        parts = [f"loss {record['loss']:.4f}", f"{rate:.0f} images/s"]
        if work.peak_flops:
            flops_per_second = work.flops * rate / work.batch_size
            record["mfu"] = round(100 * flops_per_second / work.peak_flops, 2)
            parts.append(f"MFU {record['mfu']:.1f}%")
        record["memory_gib"] = round(memory_in_use() / GIB, 2)
        parts.append(f"{record['memory_gib']:.1f} GiB")
        self._progress.update(self._task, completed=step, metrics="  ".join(parts))
        if self._workdir is None or (step - self._epoch_start) % self._every_steps:
            return
        self._record(self._workdir / STEPS_FILE, record)
        if self._progress.disable:
            seconds = (work.last_step - step) * work.batch_size / rate
            left = datetime.timedelta(seconds=round(seconds))
            position = f"epoch {self._epoch}  step {step}/{work.last_step}"
            self._print(f"{position}  {'  '.join(parts)}  {left} left")

    def epoch(self, record: Record) -> None:
        """Report a finished epoch: write its record and print the main metrics."""
        if self._workdir is None:
            return
        self._record(self._workdir / EPOCHS_FILE, record)
        self._print(
            "  ".join(text.format(record[key]) for key, text in EPOCH_FORMATS if key in record)
        )

    def _record(self, path: Path, record: Record) -> None:
        append_record(path, record)
        if self._writer is not None:
            for key, value in record.items():
                self._writer.add_scalar(key, value, record["step"])
        for tracker in self._trackers:
            tracker(record)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Trace:
    """Context manager that traces `steps` steps of a run for TensorBoard's profiler or Perfetto.

    `first_step` is the first step of this process, `last_step` the number of steps of the run.
    """

    def __init__(self, directory: Path, first_step: int, last_step: int, steps: int):
        self._directory = str(directory)
        self._first = max(first_step, min(first_step + SKIPPED_BY_TRACE, last_step - steps))
        self._end = self._first + steps
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        self.after(self._end)

    def before(self, step: int) -> None:
        """Start the trace if `step`, about to be dispatched, is the first one to trace."""
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int) -> None:
        """Stop the trace if `step`, which has finished, is the last one to trace."""
        if self._running and step >= self._end - 1:
            jax.profiler.stop_trace()
            self._running = False

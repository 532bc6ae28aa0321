"""What a run tells: a progress bar or lines, JSON lines, TensorBoard, other trackers."""

import datetime
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from activemlp_jax.training.schedules import peak_learning_rate, warmup_steps
from activemlp_jax.training.workdir import EPOCHS, STEPS, append_record
from activemlp_jax.utils.hardware import GIB, memory_in_use
from activemlp_jax.utils.types import Record

Tracker = Callable[[Record], None]

PRINTED = (
    ("epoch", "epoch {:>3}"),
    ("train_loss", "loss {:.4f}"),
    ("test_loss", "test loss {:.4f}"),
    ("test_accuracy", "accuracy {:.2f}%"),
    ("test_mean_iou", "mIoU {:.2f}%"),
    ("ema_test_accuracy", "averaged weights {:.2f}%"),
    ("ema_test_mean_iou", "averaged weights {:.2f}%"),
    ("images_per_second", "{:.0f} images/s"),
)


LAG = 5.0  # percentage points by which an average that follows its weights is never worse


def describe_length(config: ConfigDict, steps_per_epoch: int, steps: int) -> str:
    """How long a run is and the highest learning rate that its schedule aims at, in one line.

    An epoch of a single step is a sign of a batch that is too large for the data, and the line says
    what to lower.

    Args:
      config: of the run.
      steps_per_epoch: of the run.
      steps: of the whole run.

    Returns:
      Such as '8 steps an epoch, 200 in all, learning rate up to 1.0e-04'.
    """
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    number = f"{steps_per_epoch:,} step{'s' * (steps_per_epoch > 1)} an epoch"
    length = f"{number}, {steps:,} in all, learning rate up to {peak:.1e}"
    rising = warmup_steps(config.optimizer, steps_per_epoch)
    if rising > steps:
        length += f", but its warm-up takes {rising:,} steps, more than the run"
    if steps_per_epoch == 1 and config.batch_size > 1:
        length += (
            f"; config.batch_size is {config.batch_size}, more than half of an epoch; lower it, "
            f"for example with --config.batch_size={max(1, config.batch_size // 4)}"
        )
    return length


def lagging_average(config: ConfigDict, record: Record, score: str, images: int) -> str | None:
    """What to say of a run whose averaged weights are far worse than those of the last step.

    Args:
      config: of the run.
      record: of its last test.
      score: the key of the figure in percent.
      images: of the test; one of them more or less is no difference.

    Returns:
      The line, or None where there is nothing to say.
    """
    raw, averaged = record[f"test_{score}"], record.get(f"ema_test_{score}", math.inf)
    if raw - averaged <= max(LAG, 100 / images):
        return None
    warm = "" if config.ema_warmup else "set --config.ema_warmup=True, or "
    return (
        f"the averaged weights lag behind: {averaged:.2f}%, those of the last step {raw:.2f}%; "
        f"{warm}lower config.ema_decay, which is {config.ema_decay}, or train for longer"
    )


class Work(NamedTuple):
    """What a run has before it.

    `first_step` to `last_step`, which is in the epoch numbered `epochs`, `batch_size` images and
    `flops` a step, and `peak_flops`, what all devices can do a second, or None where that is not
    known.
    """

    first_step: int
    last_step: int
    epochs: int
    batch_size: int
    flops: float
    peak_flops: float | None


class Reporter:
    """Reports the steps and epochs of one run; used as a context.

    Args:
      workdir: where `metrics.jsonl`, `steps.jsonl` and `tensorboard/` go; None for a host that
        does not speak.
      work: of the run.
      config: the whole config: how many epochs there are, and what to record how often.
      console: where to print.
      trackers: called with each record of a step or an epoch: numbers by name, `step` among them.
    """

    def __init__(
        self,
        workdir: Path | None,
        work: Work,
        config: ConfigDict,
        console: Console,
        trackers: Sequence[Tracker] = (),
    ):
        self._workdir = workdir
        self._work = work
        self._every_steps = config.log_every_steps
        self._epochs = work.epochs
        self._console = console
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
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or workdir is None,
        )
        self._task = self._progress.add_task(
            "", total=work.last_step, completed=work.first_step, epoch="-", figures="-"
        )
        self._epoch, self._epoch_start = "", 0
        self._clock = time.perf_counter()
        self._steps = 0

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def start_epoch(self, epoch: int, first_step: int) -> None:
        """Begin to count images and seconds for `epoch`, whose first step this is."""
        self._epoch_start = first_step
        self._clock = time.perf_counter()
        self._steps = 0
        self._epoch = f"{epoch}/{self._epochs}"
        self._progress.update(self._task, epoch=self._epoch)

    def images_per_second(self) -> float:
        """Since the epoch began."""
        return self._steps * self._work.batch_size / (time.perf_counter() - self._clock)

    def _speed(self) -> Record:
        """Images a second, the share of what the devices can do, the memory that was needed."""
        rate = self.images_per_second()
        record = {"images_per_second": round(rate, 1)}
        if self._work.peak_flops:
            per_second = self._work.flops * rate / self._work.batch_size
            record["mfu"] = round(100 * per_second / self._work.peak_flops, 2)
        record["memory_gib"] = round(memory_in_use() / GIB, 2)
        return record

    def step(self, step: int, figures: Record) -> None:
        """A step has ended: `step` are done now; `figures` are what it found."""
        self._steps += 1
        record = {"step": step, **figures, **self._speed()}
        shown = [f"loss {record['loss']:.4f}", f"{record['images_per_second']:.0f} images/s"]
        if "mfu" in record:
            shown.append(f"MFU {record['mfu']:.1f}%")
        shown.append(f"{record['memory_gib']:.1f} GiB")
        self._progress.update(self._task, completed=step, figures="  ".join(shown))
        if self._workdir is None or (step - self._epoch_start) % self._every_steps:
            return
        append_record(self._workdir / STEPS, record)
        self._track(record)
        if self._progress.disable:
            seconds = (time.perf_counter() - self._clock) / self._steps
            left = datetime.timedelta(seconds=round(seconds * (self._work.last_step - step)))
            place = f"epoch {self._epoch}  step {step}/{self._work.last_step}"
            self._print(f"{place}  {'  '.join(shown)}  {left} left")

    def epoch(self, record: Record) -> None:
        """An epoch was evaluated: write its record, print the main figures."""
        if self._workdir is None:
            return
        append_record(self._workdir / EPOCHS, record)
        self._track(record)
        self._print(
            "  ".join(template.format(record[key]) for key, template in PRINTED if key in record)
        )

    def _track(self, record: Record) -> None:
        if self._writer is not None:
            for key, value in record.items():
                self._writer.add_scalar(key, value, record["step"])
        for tracker in self._trackers:
            tracker(record)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

"""What a run tells: a progress bar, a line an epoch, JSON lines, TensorBoard."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from activemlp_jax.training.workdir import Record, append_record

PRINTED = (
    ("epoch", "epoch {:>3}"),
    ("train_loss", "loss {:.4f}"),
    ("test_loss", "test loss {:.4f}"),
    ("test_accuracy", "accuracy {:.2f}%"),
    ("ema_test_accuracy", "averaged weights {:.2f}%"),
    ("images_per_second", "{:.0f} images/s"),
)


class Reporter:
    """Reports the steps and epochs of one run; used as a context.

    Args:
      workdir: where `metrics.jsonl` and `tensorboard/` go.
      step: the step the run starts at.
      steps: the step it ends at.
      batch_size: images a step.
      tensorboard: whether to write scalars for TensorBoard.
      console: where to print.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        steps: int,
        batch_size: int,
        tensorboard: bool,
        console: Console,
    ):
        self._workdir = workdir
        self._batch_size = batch_size
        self._console = console
        self._writer = None
        if tensorboard and step < steps:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} img/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=steps, completed=step, epoch="-", loss="-", rate="-"
        )
        self._clock = time.perf_counter()
        self._images = 0

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Begin to count images and seconds for `epoch` of `epochs`."""
        self._clock = time.perf_counter()
        self._images = 0
        self._progress.update(self._task, epoch=f"{epoch}/{epochs}")

    def images_per_second(self) -> float:
        """Since the epoch began."""
        return self._images / (time.perf_counter() - self._clock)

    def step(self, loss: float) -> None:
        """One step was handed out; `loss` is of the newest step that has ended."""
        self._images += self._batch_size
        self._progress.update(
            self._task,
            advance=1,
            loss=f"{loss:.4f}",
            rate=f"{self.images_per_second():.0f}",
        )

    def epoch(self, record: Record) -> None:
        """An epoch was evaluated: write its record, print the main figures."""
        append_record(self._workdir, record)
        shown = [template.format(record[key]) for key, template in PRINTED if key in record]
        self._console.print("  ".join(shown), highlight=False, soft_wrap=True)
        if self._writer is not None:
            for key, value in record.items():
                self._writer.add_scalar(key, value, record["step"])

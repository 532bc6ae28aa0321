"""The output of `evaluate` for segmentation models: progress and a table of the classes."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from activemlp_jax.inference.confusion import Part
from activemlp_jax.inference.tiling import Shape
from activemlp_jax.tasks.metrics import class_metrics
from activemlp_jax.utils.errors import one_line


def watch_parts(parts: Sequence[Part]) -> Iterator[Part]:
    """Iterate over parts with a progress bar that counts images and compiled image sizes."""
    console = Console(stderr=True)
    images = sum(len(part.indices) for part in parts)
    sizes = len({shape for part in parts for shape, _ in part.key.views})
    no_terminal = not console.is_terminal
    if no_terminal:
        console.print(f"{images:,} images; the network is compiled for {sizes} sizes")
    with Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, size {task.fields[size]} of " + str(sizes) + ", left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=no_terminal,
    ) as progress:
        task = progress.add_task("", total=images, size=0)
        seen: set[Shape] = set()
        for part in parts:
            seen |= {shape for shape, _ in part.key.views}
            progress.update(task, size=len(seen))
            yield part
            progress.advance(task, len(part.indices))


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> Table:
    """Make a table of the metrics of each class; `confusion` `[K, K]` is label by prediction."""
    metrics = class_metrics(confusion)
    table = Table("class", title="each class, in percent")
    for heading in ("IoU", "accuracy", "share of pixels"):
        table.add_column(heading, justify="right")
    shares = 100 * np.asarray(confusion).sum(1) / max(np.asarray(confusion).sum(), 1)
    for name, iou, accuracy, share in zip(
        class_names, metrics["iou"], metrics["accuracy"], shares, strict=True
    ):
        table.add_row(
            Text(one_line(name)),
            *("-" if np.isnan(value) else f"{value:.2f}" for value in (iou, accuracy, share)),
        )
    return table

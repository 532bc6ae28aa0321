"""Pictures of a run, for its workdir."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activemlp_jax.utils.types import Record

COLOURS = {"train": "#9aa0a6", "test": "#1a73e8", "ema": "#e8710a"}
RIGHT, WRONG = colormaps["Blues"], colormaps["Reds"]
PALEST = 0.2  # of a color map, so that one mistake among hundreds can be seen
MOST_NAMED_CLASSES = 40
LONGEST_NAME = 24  # letters
CELL = 0.3  # inches, at least, so that names and four digits can be read
MOST_WRITTEN_OUT = 10_000  # of pixels there are millions


def draw_curves(records: Sequence[Record], score: str, score_name: str, path: Path) -> None:
    """Loss, `score` and learning rate over the epochs of `metrics.jsonl`."""
    figure = Figure(figsize=(12, 3.4), dpi=110, layout="constrained")
    loss, scores, rate = figure.subplots(1, 3)

    def line(axes: Axes, key: str, label: str, colour: str) -> None:
        there = [record for record in records if key in record]  # not all epochs are tested
        if there:
            epochs, values = zip(*((record["epoch"], record[key]) for record in there), strict=True)
            axes.plot(epochs, values, label=label, color=COLOURS[colour])

    line(loss, "train_loss", "train", "train")
    line(loss, "test_loss", "test", "test")
    line(loss, "ema_test_loss", "test, averaged weights", "ema")
    line(scores, f"test_{score}", "test", "test")
    line(scores, f"ema_test_{score}", "test, averaged weights", "ema")
    line(rate, "learning_rate", "", "train")
    for axes, title in ((loss, "loss"), (scores, f"{score_name}, %"), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    loss.legend()
    if scores.lines:
        scores.legend(loc="lower right")
    figure.savefig(path)


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw the confusion matrix `[K, K]`, label by prediction.

    Cells on the diagonal are blue, mistakes red, darker for larger shares of the row; cells with
    nothing in them are white.
    Up to `MOST_NAMED_CLASSES` have their names, long ones cut, in a picture that grows with their
    number; more are numbered. Single counts are written as they are, shares of many in percent.
    """
    classes = len(class_names)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    figure = Figure(figsize=(6, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    shades = PALEST + (1 - PALEST) * shares
    cells = np.where(np.eye(classes, dtype=bool)[..., None], RIGHT(shades), WRONG(shades))
    cells[confusion == 0] = 1
    axes.imshow(cells)
    if classes <= MOST_NAMED_CLASSES:
        names = [_shortened(name) for name in class_names]
        axes.set_yticks(range(classes), names, parse_math=False)
        pixels = max(label.get_window_extent().width for label in axes.get_yticklabels())
        width, cell = pixels / figure.dpi, max(5 / classes, CELL)
        turned = 90 if width > 0.9 * cell else 0
        axes.set_xticks(range(classes), names, rotation=turned, parse_math=False)
        side = cell * classes + width
        figure.set_size_inches(side + 0.6, side + 0.9)
        in_percent = confusion.max() >= MOST_WRITTEN_OUT
        for label, prediction in np.argwhere(confusion):
            share, count = 100 * shares[label, prediction], confusion[label, prediction]
            if in_percent and share < 0.5:
                continue
            text = f"{share:.0f}%" if in_percent else f"{count:.0f}"
            size = 7 if in_percent or classes > 12 else None
            color = "white" if share > 50 else "black"
            axes.text(prediction, label, text, ha="center", va="center", color=color, size=size)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.savefig(path)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"

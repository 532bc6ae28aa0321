"""Draw the training curves and the confusion matrix of a run into picture files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activemlp_jax.plots.pictures import shortened
from activemlp_jax.utils.types import Record

COLORS = {"train": "#9aa0a6", "test": "#1a73e8", "ema": "#e8710a"}
CORRECT_COLORS, MISTAKE_COLORS = colormaps["Blues"], colormaps["Reds"]
MIN_SHADE = 0.2  # lightest shade in use, so that one mistake among hundreds is visible
MAX_NAMED_CLASSES = 40
MAX_NAME_LENGTH = 24  # characters
MIN_CELL = 0.3  # inches; makes names and four digits readable
PERCENT_FROM = 10_000  # counts from here on become percentages; pixels are counted in millions


def draw_curves(records: Sequence[Record], score: str, score_name: str, path: Path) -> None:
    """Draw loss, `score` and learning rate over the epochs of `metrics.jsonl`."""
    figure = Figure(figsize=(12, 3.4), dpi=110, layout="constrained")
    loss, scores, rate = figure.subplots(1, 3)

    def line(axes: Axes, key: str, label: str, color: str) -> None:
        # Not every epoch is tested.
        points = [(record["epoch"], record[key]) for record in records if key in record]
        if points:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, label=label, color=COLORS[color])

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

    Cells on the diagonal are blue and mistakes red, darker for larger shares of the row; empty
    cells are white.

    Up to `MAX_NAMED_CLASSES` classes are named, with long names shortened, and the picture grows
    with their number. Their cells show counts; if any count reaches `PERCENT_FROM`, they show
    percentages of the row instead, from 0.5% up. More classes than that are only numbered.
    """
    classes = len(class_names)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    figure = Figure(figsize=(6, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    shades = MIN_SHADE + (1 - MIN_SHADE) * shares
    cells = np.where(
        np.eye(classes, dtype=bool)[..., None], CORRECT_COLORS(shades), MISTAKE_COLORS(shades)
    )
    cells[confusion == 0] = 1
    axes.imshow(cells)
    if classes <= MAX_NAMED_CLASSES:
        names = [shortened(name, MAX_NAME_LENGTH) for name in class_names]
        axes.set_yticks(range(classes), names, parse_math=False)
        pixels = max(label.get_window_extent().width for label in axes.get_yticklabels())
        width, cell = pixels / figure.dpi, max(5 / classes, MIN_CELL)
        rotation = 90 if width > 0.9 * cell else 0
        axes.set_xticks(range(classes), names, rotation=rotation, parse_math=False)
        side = cell * classes + width
        figure.set_size_inches(side + 0.6, side + 0.9)
        in_percent = confusion.max() >= PERCENT_FROM
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

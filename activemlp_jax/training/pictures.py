"""Pictures of a run, for its workdir."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activemlp_jax.training.workdir import Record

COLOURS = {"train": "#9aa0a6", "test": "#1a73e8", "ema": "#e8710a"}
MOST_NUMBERED_CLASSES = 20
MOST_WRITTEN_OUT = 10_000  # of pixels there are millions


def draw_curves(records: Sequence[Record], score: str, score_name: str, path: Path) -> None:
    """Loss, `score` and learning rate over the epochs of `metrics.jsonl`."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
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
    figure.savefig(path, dpi=110)


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], title: str, path: Path
) -> None:
    """The confusion matrix `[K, K]`, label by prediction; mistakes are coloured by their share.

    Where there are few classes, single counts are written as they are, shares of many in percent.
    """
    classes = len(class_names)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= MOST_NUMBERED_CLASSES:
        axes.set_xticks(range(classes), class_names)
        axes.set_yticks(range(classes), class_names)
        if max(map(len, class_names)) > 2:
            axes.tick_params(axis="x", rotation=45)
        in_percent = confusion.max() >= MOST_WRITTEN_OUT
        for label, prediction in np.argwhere(confusion):
            colour = "white" if shares[label, prediction] > 0.5 else "#c5221f"
            share, count = 100 * shares[label, prediction], confusion[label, prediction]
            if in_percent and share < 0.5:
                continue
            text = f"{share:.0f}%" if in_percent else f"{count:.0f}"
            size = 7 if in_percent else None
            axes.text(prediction, label, text, ha="center", va="center", color=colour, size=size)
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.savefig(path, dpi=110)

"""Pictures of a run, for its workdir."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from activemlp_jax.training.workdir import Record

COLOURS = {"train": "#9aa0a6", "test": "#1a73e8", "ema": "#e8710a"}
MOST_NUMBERED_CLASSES = 20


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs of `metrics.jsonl`."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in records]

    def line(axes: Axes, key: str, label: str, colour: str) -> None:
        if key in records[0]:
            values = [record[key] for record in records]
            axes.plot(epochs, values, label=label, color=COLOURS[colour])

    line(loss, "train_loss", "train (smoothed labels)", "train")
    line(loss, "test_loss", "test", "test")
    line(loss, "ema_test_loss", "test, averaged weights", "ema")
    line(accuracy, "test_accuracy", "test", "test")
    line(accuracy, "ema_test_accuracy", "test, averaged weights", "ema")
    line(rate, "learning_rate", "", "train")
    for axes, title in ((loss, "loss"), (accuracy, "accuracy, %"), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    loss.legend()
    accuracy.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], accuracy: float, path: Path
) -> None:
    """The confusion matrix `[K, K]`, label by prediction; mistakes are coloured by their share."""
    classes = len(class_names)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    figure = Figure(figsize=(6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= MOST_NUMBERED_CLASSES:
        axes.set_xticks(range(classes), class_names)
        axes.set_yticks(range(classes), class_names)
        for label, prediction in np.argwhere(confusion):
            colour = "white" if shares[label, prediction] > 0.5 else "#c5221f"
            text = f"{confusion[label, prediction]:.0f}"
            axes.text(prediction, label, text, ha="center", va="center", color=colour)
    correct, total = int(np.trace(confusion)), int(confusion.sum())
    axes.set_title(f"{correct} of {total} test images right ({accuracy:.2f}%)")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.savefig(path, dpi=110)

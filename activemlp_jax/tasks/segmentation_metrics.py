"""Segmentation metrics from a confusion matrix of pixels over a whole dataset, and their table."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from activemlp_jax.utils.errors import one_line


def class_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Compute `iou` and `accuracy` of each class, `[K]` float64, in percent.

    `confusion` `[K, K]` counts pixels, label by prediction. Both are NaN for a class that is
    neither in the labels nor in the predictions. A class that is predicted but not in the labels
    has IoU 0 and accuracy NaN.

    Source: mmsegmentation's intersect_and_union and mIoU.
    """
    confusion = np.asarray(confusion, np.float64)
    correct, labeled, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "iou": 100 * correct / (labeled + predicted - correct),
            "accuracy": 100 * correct / labeled,
        }


def scene_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Compute `mean_iou`, `mean_accuracy` and `pixel_accuracy` of a dataset, in percent.

    The means skip classes whose value is NaN. A mean is NaN if the values of all classes are NaN.
    """
    per_class = class_metrics(confusion)
    total = np.asarray(confusion).sum()
    return {
        "mean_iou": _mean(per_class["iou"]),
        "mean_accuracy": _mean(per_class["accuracy"]),
        "pixel_accuracy": float(100 * np.trace(confusion) / total) if total else float("nan"),
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


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

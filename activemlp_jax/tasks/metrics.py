"""The figures of segmentation, from pixels counted over a whole data set."""

import numpy as np


def class_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """For each class, its `iou` and `accuracy` in percent, NaN where it does not occur.

    Args:
      confusion: pixels `[K, K]`, label by prediction.

    Returns:
      `[K]` each. The union of a class that is predicted but never there is not empty, so its `iou`
      is 0; its accuracy has no meaning, NaN.

    Source: mmsegmentation's intersect_and_union and mIoU.
    """
    confusion = np.asarray(confusion, np.float64)
    right, there, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "iou": 100 * right / (there + predicted - right),
            "accuracy": 100 * right / there,
        }


def scene_metrics(confusion: np.ndarray) -> dict[str, float]:
    """`mean_iou`, `mean_accuracy`, over classes that occur, and `pixel_accuracy`, in percent.

    Args:
      confusion: pixels `[K, K]`, label by prediction.
    """
    figures = class_figures(confusion)
    total = np.asarray(confusion).sum()
    return {
        "mean_iou": _mean(figures["iou"]),
        "mean_accuracy": _mean(figures["accuracy"]),
        "pixel_accuracy": float(100 * np.trace(confusion) / total) if total else float("nan"),
    }


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")

"""mIoU, mAcc and aAcc of labels as stored, compared with the original's."""

import goldens
import jax
import numpy as np
import pytest

from activemlp_jax.data.segmentation_transforms import labels_of_mask
from activemlp_jax.inference.segmentation_evaluation import count_pixels
from activemlp_jax.tasks.segmentation_metrics import class_metrics, scene_metrics

CLASSES = 7


def golden_confusion() -> np.ndarray:
    golden = goldens.load("miou.npz")
    total = np.zeros((CLASSES, CLASSES), np.int64)
    count = jax.jit(count_pixels, static_argnums=2)
    for number in range(3):
        prediction, stored = golden[f"pred_{number}"], golden[f"label_{number}"]
        label = labels_of_mask(stored, "label", prediction.shape, CLASSES, reduce_zero_label=True)
        total += np.asarray(count(label[None], prediction[None].astype(np.int32), CLASSES)[0])
    return total


def test_accuracies_and_intersections_over_unions_are_the_originals():
    golden, confusion = goldens.load("miou.npz"), golden_confusion()
    figures = class_metrics(confusion)
    np.testing.assert_allclose(figures["iou"], 100 * golden["iou"], rtol=1e-12)
    np.testing.assert_allclose(figures["accuracy"], 100 * golden["acc"], rtol=1e-12)
    metrics = scene_metrics(confusion)
    assert metrics["pixel_accuracy"] == 100 * float(golden["all_acc"])
    assert metrics["mean_iou"] == pytest.approx(100 * np.nanmean(golden["iou"]), rel=1e-12)
    assert metrics["mean_accuracy"] == pytest.approx(100 * np.nanmean(golden["acc"]), rel=1e-12)


def test_classes_that_do_not_occur_are_left_out_of_the_means():
    confusion = np.zeros((4, 4), np.int64)
    confusion[0, 0], confusion[1, 1], confusion[1, 2] = 10, 6, 2
    figures = class_metrics(confusion)
    np.testing.assert_allclose(figures["iou"], [100, 75, 0, np.nan])  # no pixel is class 2
    np.testing.assert_allclose(figures["accuracy"], [100, 75, np.nan, np.nan])
    assert scene_metrics(confusion) == {
        "mean_iou": pytest.approx(175 / 3),
        "mean_accuracy": pytest.approx(87.5),
        "pixel_accuracy": pytest.approx(100 * 16 / 18),
    }


def test_ignored_pixels_count_nowhere():
    label = np.array([[[0, 255], [1, 255]]], np.uint8)
    prediction = np.array([[[0, 1], [0, 0]]], np.int32)
    found = jax.jit(count_pixels, static_argnums=2)(label, prediction, 2)
    np.testing.assert_array_equal(found, [[[1, 0], [1, 0]]])


def test_nothing_but_ignored_pixels_has_no_figures():
    assert all(np.isnan(value) for value in scene_metrics(np.zeros((3, 3), np.int64)).values())

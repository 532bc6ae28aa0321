"""Loss and metrics of classification against plain numpy."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np

import activemlp_jax as am
from activemlp_jax.data.device import normalise
from activemlp_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from activemlp_jax.training.tasks import Classification


def task(label_smoothing: float = 0.1) -> Classification:
    model = am.ActiveMLP(**goldens.MICRO)
    return Classification(model, label_smoothing, IMAGENET_MEAN, IMAGENET_STD)


def batch_and_log_probabilities() -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, 6).astype(np.int32),
        "mask": np.array([1, 1, 1, 1, 0, 0], np.float32),
    }
    params = goldens.rule_variables(task().model)["params"]
    images = normalise(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    logits = np.asarray(jax.jit(task().model.apply)({"params": params}, images), np.float64)
    return batch, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), params


def test_images_are_normalised_by_mean_and_standard_deviation():
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    expected = (np.array([0, 128, 255]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    ours = normalise(jnp.asarray(image), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(ours.reshape(-1), expected, rtol=1e-6)


def test_loss_is_the_cross_entropy_to_smoothed_labels():
    batch, log_probabilities, params = batch_and_log_probabilities()
    targets = np.full((6, 10), 0.1 / 10)
    targets[np.arange(6), batch["label"]] += 0.9
    expected = -(targets * log_probabilities).sum(-1).mean()
    ours = jax.jit(task().loss)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_padding_counts_nowhere():
    batch, log_probabilities, params = batch_and_log_probabilities()
    sums = jax.jit(task().count)(params, batch)
    labels, rows = batch["label"][:4], np.arange(4)
    ranks = (log_probabilities > log_probabilities[np.arange(6), batch["label"], None]).sum(-1)
    assert float(sums["examples"]) == 4
    np.testing.assert_allclose(sums["loss"], -log_probabilities[rows, labels].sum(), rtol=1e-5)
    assert float(sums["top5"]) == (ranks[:4] < 5).sum()
    confusion = np.zeros((10, 10))
    np.add.at(confusion, (labels, log_probabilities.argmax(-1)[:4]), 1)
    np.testing.assert_array_equal(sums["confusion"], confusion)


def test_metrics_are_means_in_percent():
    confusion = np.diag([3.0, 2.0])
    confusion[0, 1] = 3
    sums = {"loss": 4.0, "top5": 8.0, "examples": 8.0, "confusion": confusion}
    assert Classification.metrics(sums) == {
        "loss": 0.5,
        "accuracy": 62.5,
        "accuracy_top5": 100.0,
    }

"""Loss and metrics of classification, compared with plain numpy."""

from functools import lru_cache, partial
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np

import activemlp_jax as am
from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.config import default_config


def task(**changes: Any) -> Classification:
    config = default_config()
    config.label_smoothing = 0.1
    config.batch_size = 6
    config.update_from_flattened_dict(changes)
    return Classification(am.ActiveMLP(**goldens.MICRO), Preprocessing(32), config)


@lru_cache(maxsize=1)
def batch_and_log_probabilities() -> tuple[dict[str, np.ndarray], np.ndarray, dict]:
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, 6).astype(np.int32),
        "mask": np.array([1, 1, 1, 1, 0, 0], np.float32),
    }
    variables = goldens.rule_variables(task().model)
    images = normalize(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    logits = np.asarray(jax.jit(task().model.apply)(variables, images), np.float64)
    return batch, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), variables


def test_images_are_normalized_by_mean_and_standard_deviation():
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    expected = (np.array([0, 128, 255]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    ours = normalize(jnp.asarray(image), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(ours.reshape(-1), expected, rtol=1e-6)


def loss(task: Classification, variables: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Compute the loss of a whole batch in the same way as the training step."""
    value, moved = task.loss(variables, task.inputs(batch, jax.random.fold_in(key, 1)), key)
    assert moved == {}
    return value


def test_loss_is_the_cross_entropy_to_smoothed_labels():
    batch, log_probabilities, variables = batch_and_log_probabilities()
    targets = np.full((6, 10), 0.1 / 10)
    targets[np.arange(6), batch["label"]] += 0.9
    expected = -(targets * log_probabilities).sum(-1).mean()
    ours = jax.jit(partial(loss, task()))(variables, batch, jax.random.key(0))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


MIXED = {"augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0, "augment.mix_group_size": 3}


def test_smoothed_targets_are_mixed_with_the_images():
    """Smoothed labels of a row and its partner are mixed with the same weights as the images."""
    batch, _, _ = batch_and_log_probabilities()
    labels = np.full((6, 10), 0.1 / 10)
    labels[np.arange(6), batch["label"]] += 0.9
    partners = [2, 1, 0, 5, 4, 3]
    plain = np.asarray(normalize(batch["image"], IMAGENET_MEAN, IMAGENET_STD))
    inputs = jax.jit(task(**MIXED).inputs)
    kinds = set()
    for seed in range(12):
        images, targets = map(np.asarray, inputs(batch, jax.random.key(seed)))
        for row, partner in enumerate(partners):
            if batch["label"][row] == batch["label"][partner]:
                continue
            own = targets[row, batch["label"][row]] - 0.01
            share = own / 0.9
            expected = share * labels[row] + (1 - share) * labels[partner]
            np.testing.assert_allclose(targets[row], expected, atol=1e-6)
            mixed = share * plain[row] + (1 - share) * plain[partner]
            is_mixup = np.allclose(images[row], mixed, atol=1e-4)
            if not is_mixup:
                from_own, from_partner = (
                    np.isclose(images[row], plain[source], atol=1e-5).all(-1)
                    for source in (row, partner)
                )
                assert (from_own | from_partner).all()
                np.testing.assert_allclose(from_own.mean(), share, atol=1e-5)
            kinds.add(is_mixup)
    assert kinds == {True, False}


def test_erasing_comes_before_mixing():
    """The noise in an erased box is then blended with the partner's pixels, as in the original."""
    batch, _, _ = batch_and_log_probabilities()
    batch = {**batch, "image": np.full_like(batch["image"], 128)}
    settings = {"random_erasing": 1.0, "mixup_alpha": 0.8, "mix_group_size": 6}
    settings = {f"augment.{key}": value for key, value in settings.items()}
    images, _ = jax.jit(task(**settings).inputs)(batch, jax.random.key(0))
    plain = normalize(batch["image"], IMAGENET_MEAN, IMAGENET_STD)
    changed = np.asarray((images != plain).any(-1))
    # The boxes of a row and of its partner show in both, so partners change in the same pixels.
    np.testing.assert_array_equal(changed, changed[::-1])


def test_in_bfloat16_models_pixels_and_targets_stay_float32():
    batch, _, _ = batch_and_log_probabilities()
    config = task(**MIXED, **{"augment.random_erasing": 0.25}).config
    model = am.ActiveMLP(**goldens.MICRO, dtype=jnp.bfloat16)
    half = Classification(model, Preprocessing(32), config)
    images, targets = jax.jit(half.inputs)(batch, jax.random.key(0))
    assert images.dtype == targets.dtype == jnp.float32
    np.testing.assert_allclose(targets.sum(-1), np.ones(6), rtol=1e-6)
    variables = goldens.rule_variables(model)
    full = task(**MIXED, **{"augment.random_erasing": 0.25})
    ours, exact = (
        jax.jit(partial(loss, t))(variables, batch, jax.random.key(0)) for t in (half, full)
    )
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=2e-2)


def test_padding_counts_nowhere():
    batch, log_probabilities, variables = batch_and_log_probabilities()
    sums = jax.jit(task().count)(variables, batch)
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

"""Loss and inputs of segmentation, compared with plain numpy."""

from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ScenePreprocessing
from activemlp_jax.tasks.segmentation import Segmentation, pixel_cross_entropy
from activemlp_jax.training.config import default_config


def task(head: str = "upernet") -> Segmentation:
    config = default_config()
    config.task = "segmentation"
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head], dropout_rate=0.0)
    return Segmentation(model, ScenePreprocessing(), config)


def test_ignored_pixels_add_nothing_but_count_in_the_mean():
    logits = goldens.normal(0, "logits", (2, 4, 4, 3))
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 4)).astype(np.uint8)
    labels[0, :2] = 255
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    known = np.minimum(labels, 2)
    picked = np.take_along_axis(shares, known[..., None], -1)[..., 0]
    expected = -(picked * (labels != 255)).sum() / labels.size
    ours = jax.jit(pixel_cross_entropy)(logits.astype(np.float32), labels)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_padding_is_zero_after_normalizing():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    extent = np.array([[8, 8], [5, 3]], np.int32)
    labels = np.zeros((2, 8, 8), np.uint8)
    batch = {"image": images, "label": labels, "extent": extent}
    ours, same_labels = jax.jit(task().inputs)(batch, jax.random.key(0))
    expected = (images / 255 - IMAGENET_MEAN) / np.array(IMAGENET_STD)
    expected[1, 5:] = 0
    expected[1, :, 3:] = 0
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same_labels, labels)


@pytest.mark.parametrize("head", ["upernet", "fpn"])
def test_the_loss_of_a_step_is_the_originals_and_moves_the_statistics(head: str):
    """In float32, the loss is the golden loss, plus 0.4 times UperNet's auxiliary loss."""
    golden = goldens.load(f"seg_micro_{head}.npz")
    images = jnp.asarray(goldens.golden_input(f"seg_micro_{head}.npz", "input"), jnp.float32)
    labels, variables = jnp.asarray(golden["label"]), goldens.rule_variables(task(head).model)

    def run(variables: Any, inputs: Any, key: jax.Array) -> Any:
        return task(head).loss(variables, inputs, key)

    loss, moved = jax.jit(run)(variables, (images, labels), jax.random.key(0))
    parts = [value for name, value in golden.items() if name.endswith("loss_seg")]
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-4)
    assert set(moved) == {"batch_stats"}
    counts = [leaf for leaf in jax.tree.leaves(moved) if leaf.ndim == 0]
    assert {int(count) for count in counts} == {2}

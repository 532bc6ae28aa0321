"""Options for fine-tuning: layer-wise decay of the learning rate, and clipping."""

from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import activemlp_jax as am
from activemlp_jax.training.config import default_config
from activemlp_jax.training.optimizer import layer_scales, make_optimizer


def settings(**changes: Any) -> Any:
    config = default_config().optimizer
    config.update(changes)
    return config


def micro() -> tuple[am.ActiveMLP, Any]:
    model = am.ActiveMLP(**goldens.MICRO)
    return model, goldens.rule_variables(model)["params"]


def test_each_block_learns_slower_than_the_one_after_it():
    model, params = micro()
    scales = layer_scales(params, model, decay=0.5)
    named = {
        name: float(value.reshape(-1)[0])
        for name, value in am.to_torch(
            {"params": jax.tree.map(lambda scale, leaf: np.full(leaf.shape, scale), scales, params)}
        ).items()
    }
    blocks = sum(model.depths)
    assert named["head.weight"] == named["norm.weight"] == 1
    assert named["patch_embed.proj.weight"] == 0.5 ** (blocks + 1)
    assert jax.tree.leaves(scales["stages_3"]["block_1"])[0] == 0.5
    assert jax.tree.leaves(scales["stages_3"]["block_0"])[0] == 0.5**2
    assert jax.tree.leaves(scales["downsamples_2"])[0] == 0.5**3
    assert jax.tree.leaves(scales["stages_2"]["block_3"])[0] == 0.5**3
    assert jax.tree.leaves(scales["stages_0"]["block_0"])[0] == 0.5**blocks
    assert jax.tree.leaves(scales["stages_0"]["peg"])[0] == 0.5**blocks
    assert jax.tree.leaves(scales["stages_1"]["peg"])[0] == 0.5 ** (blocks - 2)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_layer_decay_scales_the_whole_update(weight_decay: float):
    model, params = micro()
    gradients = jax.tree.map(jnp.ones_like, params)

    def updates(layer_decay: float) -> Any:
        config = settings(layer_decay=layer_decay, weight_decay=weight_decay)
        optimizer = make_optimizer(config, lambda _: 1e-3, model)
        return jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])()

    plain, scaled = updates(1.0), updates(0.7)
    scales = layer_scales(params, model, 0.7)
    jax.tree.map(
        lambda a, b, scale: np.testing.assert_allclose(b, a * scale, rtol=1e-5),
        plain,
        scaled,
        scales,
    )


def test_a_gradient_longer_than_the_bound_is_shortened_to_it():
    model, params = am.ActiveMLP(**goldens.MICRO), {"head": {"kernel": jnp.arange(12.0)}}
    config = settings(clip_norm=1.0, b1=0.0, b2=0.0, eps=1e8, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda _: 1e8, model)  # updates equal the gradient

    def length(factor: float) -> float:
        scale = factor / float(optax.tree.norm(params))
        gradients = jax.tree.map(lambda leaf: scale * leaf, params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return float(optax.tree.norm(updates))

    np.testing.assert_allclose([length(0.5), length(1), length(30)], [0.5, 1, 1], rtol=1e-4)

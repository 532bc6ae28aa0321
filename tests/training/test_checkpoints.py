"""Checkpoints hold the whole state as it was, while training goes on."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from activemlp_jax.training import sharding
from activemlp_jax.training.checkpoints import Checkpoints
from activemlp_jax.training.step import TrainState, make_train_step

OPTIMIZER = optax.adam(0.1)
SHARDING = sharding.replicated(sharding.make_mesh())


def new_state() -> TrainState:
    params = {"large": jnp.ones((512, 512)), "small": jnp.arange(3.0)}
    return TrainState.create(params, OPTIMIZER, ema_decay=0.9)


@pytest.mark.parametrize("steps_after", [0, 50])
def test_a_state_comes_back_as_it_was_at_the_save(tmp_path: Path, steps_after: int):
    def loss(params: dict[str, jax.Array], *_: object) -> jax.Array:
        return sum(leaf.sum() for leaf in jax.tree.leaves(params))

    # Donation lets a step write into the very buffers that are being saved.
    step = jax.jit(make_train_step(loss, OPTIMIZER, 0.9, seed=0), donate_argnums=0)
    state, _ = step(new_state(), {})
    saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state)
        for _ in range(steps_after):
            state, _ = step(state, {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(jax.eval_shape(new_state), SHARDING)
    for ours, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_an_empty_directory_has_no_state(tmp_path: Path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_latest(jax.eval_shape(new_state), SHARDING) is None


def test_only_the_newest_are_kept(tmp_path: Path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(new_state().replace(step=jnp.asarray(step)))
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == {"2", "3"}

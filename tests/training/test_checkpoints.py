"""Checkpoints hold the whole state as it was, while training goes on."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from activemlp_jax.errors import UserError
from activemlp_jax.training import sharding
from activemlp_jax.training.checkpoints import Best, Checkpoints
from activemlp_jax.training.config import default_config
from activemlp_jax.training.step import TrainState, make_train_step

OPTIMIZER = optax.adam(0.1)
EVERYWHERE = sharding.replicated(sharding.make_mesh())


def config(**changes: Any) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def shapes() -> TrainState:
    """A state of shapes, each array whole on every device."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=EVERYWHERE),
        jax.eval_shape(new_state),
    )


def new_state() -> TrainState:
    params = {"large": jnp.ones((512, 512)), "small": jnp.arange(3.0)}
    return TrainState.create({"params": params}, OPTIMIZER, ema_decay=0.9)


@pytest.mark.parametrize("steps_after", [0, 50])
def test_a_state_comes_back_as_it_was_at_the_save(tmp_path: Path, steps_after: int):
    def loss(variables: dict[str, Any], *_: object) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(variables["params"])), {}

    # Donation lets a step write into the very buffers that are being saved.
    step = jax.jit(make_train_step(loss, OPTIMIZER, 0.9, seed=0), donate_argnums=0)
    state, _ = step(new_state(), {})
    saved = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    with Checkpoints(tmp_path, config()) as checkpoints:
        checkpoints.save(state, 1, [0.1, 0.2])
        for _ in range(steps_after):
            state, _ = step(state, {})
    with Checkpoints(tmp_path, config()) as checkpoints:
        restored = checkpoints.restore(shapes())
    assert restored is not None
    assert restored.losses == [0.1, 0.2]
    for ours, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(saved), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_an_empty_directory_has_no_state(tmp_path: Path):
    with Checkpoints(tmp_path, config()) as checkpoints:
        assert checkpoints.restore(shapes()) is None
        assert checkpoints.best() is None
        assert checkpoints.newest(below=10) is None


def save_all(directory: Path, accuracies: Sequence[float | None], **changes: Any) -> set[str]:
    """Saves at the steps 1, 2 and so on; the names of the checkpoints that are left."""
    with Checkpoints(directory, config(**changes)) as checkpoints:
        for step, accuracy in enumerate(accuracies, 1):
            state = new_state().replace(step=jnp.asarray(step))
            checkpoints.save(state, step, [], accuracy)
            checkpoints.wait()
    return {path.name for path in directory.iterdir() if path.name.isdigit()}


def test_only_the_newest_are_kept(tmp_path: Path):
    assert save_all(tmp_path, [None] * 4) == {"3", "4"}


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    accuracies = (70.0, 90.0, None, 80.0, 85.0, None)
    assert save_all(tmp_path, accuracies, **{"checkpoint.keep": 1}) == {"2", "6"}
    with Checkpoints(tmp_path, config()) as checkpoints:
        assert checkpoints.best() == Best(2, 90.0)
        assert checkpoints.newest(below=6) == tmp_path / "2"
        best = checkpoints.restore(shapes(), 2)
    assert best is not None
    assert int(best.state.step) == 2


def test_every_setting_that_differs_is_named(tmp_path: Path):
    save_all(tmp_path, [None])
    other = config(**{"seed": 1, "model.depths": (2, 2, 4, 2)})
    message = r"/1 is of a run with other settings: model\.depths .*; seed \(0 there, 1 here\)"
    with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(shapes())


def test_a_checkpoint_that_cannot_be_read_is_named_and_stays(tmp_path: Path):
    save_all(tmp_path, [None])
    for path in (tmp_path / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with (
        Checkpoints(tmp_path, config()) as checkpoints,
        pytest.raises(UserError, match=r"/1 cannot be read: .*; remove it to go on from"),
    ):
        checkpoints.restore(shapes())
    assert (tmp_path / "1").exists()


def test_checkpoints_are_due_by_number_or_by_the_clock(tmp_path: Path):
    with Checkpoints(tmp_path / "a", config(**{"checkpoint.every_steps": 3})) as checkpoints:
        assert [step for step in range(1, 10) if checkpoints.is_due(step)] == [3, 6, 9]
    with Checkpoints(tmp_path / "b", config()) as checkpoints:
        assert not any(checkpoints.is_due(step) for step in range(1, 100))
    minutes = config(**{"checkpoint.every_minutes": 0.005})
    with Checkpoints(tmp_path / "c", minutes) as checkpoints:
        assert not checkpoints.is_due(1)
        time.sleep(0.35)
        assert checkpoints.is_due(2)
        checkpoints.save(new_state(), 2, [])
        assert not checkpoints.is_due(3)

"""The train step: gradient, update, average of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any
Batch = dict[str, jax.Array]
Loss = Callable[[Params, Batch, jax.Array], jax.Array]  # parameters, batch, key to a scalar


class TrainState(struct.PyTreeNode):
    """All that a run carries from step to step; `ema_params` is None where no average is kept."""

    step: jax.Array
    params: Params
    ema_params: Params | None
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """The state before the first step; the average starts at the initial weights."""
        ema_params = jax.tree.map(jnp.copy, params) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """The function of one step: state and batch to the next state and the loss before it.

    Random numbers come from `seed` and the state's step alone, so a resumed run draws the same.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, gradients = jax.value_and_grad(loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        return TrainState(state.step + 1, params, ema_params, opt_state), value

    return train_step

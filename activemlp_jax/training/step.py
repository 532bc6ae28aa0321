"""The train step: gradient, update, average of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Params = Any
Batch = dict[str, jax.Array]
Inputs = Any  # arrays whose first axis is the batch's
Loss = Callable[[Params, Inputs, jax.Array], jax.Array]  # parameters, inputs, key to a scalar
Metrics = dict[str, jax.Array]


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


def _identity(tree: Any) -> Any:
    return tree


def _same_inputs(batch: Batch, key: jax.Array) -> Inputs:
    del key
    return batch


def _parts(inputs: Inputs, number: int) -> Inputs:
    """Arrays `[B, ...]` as `[number, B / number, ...]`.

    Part k has the rows k, k + number and so on, so that every device takes its part of each from
    the rows that it holds.
    """

    def split(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(rows) // number, number, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, inputs)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    *,
    inputs: Callable[[Batch, jax.Array], Inputs] = _same_inputs,
    accumulation: int = 1,
    gather: Callable[[Params], Params] = _identity,
    scatter: Callable[[Params], Params] = _identity,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step: state and batch to the next state and figures of this step.

    Random numbers come from `seed` and the state's step alone, so a resumed run draws the same.

    Args:
      loss: a mean over its inputs' rows.
      optimizer: that turns gradients into updates.
      ema_decay: of the average; 0 where the state has none.
      seed: of the run.
      inputs: what the loss takes, from a batch and a key; made for the whole batch at once.
      accumulation: equal parts to take the inputs in, one after the other; their mean gradient is
        the whole batch's.
      gather: parameters as the state keeps them to what the loss needs on each device.
      scatter: gradients to where the state keeps the parameters.

    Returns:
      The function. Its figures are `loss`, before the update, `gradient_norm`, and
      `parameter_norm`, after it: norms over all parameters together.
    """

    def gradient(params: Params, examples: Inputs, key: jax.Array) -> tuple[jax.Array, Params]:
        value, gradients = jax.value_and_grad(loss)(params, examples, key)
        return value, scatter(gradients)

    def accumulated(params: Params, examples: Inputs, key: jax.Array) -> tuple[jax.Array, Params]:
        def add(total: Any, part: tuple[Inputs, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        parts = _parts(examples, accumulation), jax.random.split(key, accumulation)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, examples, key))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        examples = inputs(batch, jax.random.fold_in(key, 1))
        whole = accumulated if accumulation > 1 else gradient
        value, gradients = whole(gather(state.params), examples, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics = {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step

"""The train step: gradient, update, average of the weights."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from activemlp_jax.utils.types import Batch, Params, Variables

Inputs = Any  # arrays whose first axis is the batch's
# Variables, inputs and a key, to a scalar and those of the other collections that have moved.
Loss = Callable[[Variables, Inputs, jax.Array], tuple[jax.Array, Variables]]
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that a run carries from step to step; `ema` is None where no average is kept.

    `variables` is what the model's `apply` takes, `ema` the average of all of it.
    """

    step: jax.Array
    variables: Variables
    ema: Variables | None
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, variables: Variables, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """The state before the first step; the average starts at the initial weights."""
        ema = jax.tree.map(jnp.copy, variables) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), variables, ema, optimizer.init(variables["params"]))


def _decay(limit: float, step: jax.Array) -> jax.Array:
    """Of the average at the step numbered `step`, from 0, where it warms up to `limit`."""
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def _average(new: jax.Array, old: jax.Array, step_size: float | jax.Array) -> jax.Array:
    if jnp.issubdtype(new.dtype, jnp.integer):  # a count
        return new
    # The step size of a warm-up is an array, whose dtype may be wider than the weights'.
    return optax.incremental_update(new, old, step_size).astype(old.dtype)


def _total(parts: Sequence[jax.Array]) -> jax.Array:
    """Their sum, by halves: along a chain of additions a compiler goes link by link."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _total(parts[:half]) + _total(parts[half:])


def norm_over_all(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, as `optax.tree.norm`, with less to compile.

    Squares of leaves of one shape are added up before they are summed: there are hundreds of
    leaves, and a CPU's compiler makes three loops of every sum.
    """
    squares: dict[tuple[int, ...], list[jax.Array]] = defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        squares[leaf.shape].append(jnp.square(leaf))
    return jnp.sqrt(_total([_total(same).sum() for same in squares.values()]))


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
    ema_warmup: bool = False,
    inputs: Callable[[Batch, jax.Array], Inputs] = _same_inputs,
    accumulation: int = 1,
    gather: Callable[[Variables], Variables] = _identity,
    scatter: Callable[[Params], Params] = _identity,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step: state and batch to the next state and figures of this step.

    Random numbers come from `seed` and the state's step alone, so a resumed run draws the same.

    Args:
      loss: a mean over its inputs' rows.
      optimizer: that turns gradients into updates.
      ema_decay: of the average; 0 where the state has none.
      seed: of the run.
      ema_warmup: whether step t, from 0, decays by (1 + t) / (10 + t) where that is less, so that
        the average follows a short run, too.
      inputs: what the loss takes, from a batch and a key; made for the whole batch at once.
      accumulation: equal parts to take the inputs in, one after the other; their mean gradient is
        the whole batch's, unless the loss moves anything, which needs 1.
      gather: variables as the state keeps them to what the loss needs on each device.
      scatter: gradients to where the state keeps the parameters.

    Returns:
      The function. Its figures are `loss`, before the update, `gradient_norm`, and
      `parameter_norm`, after it: norms over all parameters together.

    Source: the warm-up of the average, `num_updates` of TensorFlow's ExponentialMovingAverage.
    """

    def gradient(
        variables: Variables, examples: Inputs, key: jax.Array
    ) -> tuple[tuple[jax.Array, Params], Variables]:
        def of_params(params: Params) -> tuple[jax.Array, Variables]:
            return loss({**variables, "params": params}, examples, key)

        value_and_grad = jax.value_and_grad(of_params, has_aux=True)
        (value, moved), gradients = value_and_grad(variables["params"])
        return (value, scatter(gradients)), moved

    def accumulated(
        variables: Variables, examples: Inputs, key: jax.Array
    ) -> tuple[tuple[jax.Array, Params], Variables]:
        def add(total: Any, part: tuple[Inputs, jax.Array]) -> tuple[Any, None]:
            found, moved = gradient(variables, *part)
            assert not moved, "statistics of a batch are not those of its parts"
            return jax.tree.map(jnp.add, total, found), None

        parts = _parts(examples, accumulation), jax.random.split(key, accumulation)
        shapes, _ = jax.eval_shape(gradient, variables, examples, key)
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        return jax.tree.map(lambda leaf: leaf / accumulation, total), {}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        examples = inputs(batch, jax.random.fold_in(key, 1))
        whole = accumulated if accumulation > 1 else gradient
        (value, gradients), moved = whole(gather(state.variables), examples, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        variables, ema = {**state.variables, **moved, "params": params}, state.ema
        if ema is not None:
            decay = _decay(ema_decay, state.step) if ema_warmup else ema_decay
            ema = jax.tree.map(partial(_average, step_size=1 - decay), variables, ema)
        metrics = {
            "loss": value,
            "gradient_norm": norm_over_all(gradients),
            "parameter_norm": norm_over_all(params),
        }
        return TrainState(state.step + 1, variables, ema, opt_state), metrics

    return train_step

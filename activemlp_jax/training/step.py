"""The train step: gradients, optimizer update and averaged weights."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from activemlp_jax.utils.types import Batch, Params, Variables

# (variables, inputs, key) -> (scalar loss, updated collections other than `params`)
Loss = Callable[[Variables, Any, jax.Array], tuple[jax.Array, Variables]]
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """The state that a run carries from step to step.

    Attributes:
      step: number of steps done, an int32 scalar.
      variables: what the model's `apply` takes: `params` and the other collections.
      ema: exponential moving average of all of `variables`; None if the run keeps no average.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    variables: Variables
    ema: Variables | None
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, variables: Variables, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """Create the state before the first step; the average starts at the initial variables."""
        ema = jax.tree.map(jnp.copy, variables) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), variables, ema, optimizer.init(variables["params"]))

    def weights(self) -> dict[str, Variables]:
        """The variables as 'model', and their average, if the run keeps one, as 'ema'."""
        return {"model": self.variables} | ({} if self.ema is None else {"ema": self.ema})


def _total(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum arrays as a balanced tree: XLA works through a chain of additions link by link."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _total(parts[:half]) + _total(parts[half:])


def norm_over_all(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, as `optax.tree.norm`, but faster to compile.

    Squares of leaves with the same shape are added before they are summed: a model has hundreds of
    leaves, and XLA on CPUs compiles every sum to three loops.
    """
    squares: dict[tuple[int, ...], list[jax.Array]] = defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        squares[leaf.shape].append(jnp.square(leaf))
    return jnp.sqrt(_total([_total(group).sum() for group in squares.values()]))


def _identity(tree: Any) -> Any:
    return tree


def _split_batch(inputs: Any, parts: int) -> Any:
    """Reshape arrays from `[B, ...]` to `[parts, B / parts, ...]`.

    Part k has the rows k, k + parts and so on, so that every device finds its share of each part
    among the rows that it already holds.
    """

    def split(rows: jax.Array) -> jax.Array:
        return rows.reshape(len(rows) // parts, parts, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, inputs)


def loss_and_gradients(
    loss: Loss,
    variables: Variables,
    inputs: Any,
    key: jax.Array,
    parts: int = 1,
    shard: Callable[[Params], Params] = _identity,
) -> tuple[jax.Array, Params, Variables]:
    """Compute the loss and its gradients, over the whole batch or accumulated over parts of it.

    Args:
      loss: the loss function, a mean over the rows of its inputs.
      variables: variables of the model.
      inputs: inputs of the loss: a tree of arrays with the batch as their first axis.
      key: random key for the loss.
      parts: number of equal parts to process one after the other. The mean of their gradients is
        the gradient of the whole batch. More than one requires a loss that updates no
        collections, so no batch statistics.
      shard: puts gradients where the state keeps the parameters.

    Returns:
      The loss, its gradients with respect to `params`, and the other collections that it updated.
    """

    def part_gradients(inputs: Any, key: jax.Array) -> tuple[tuple[jax.Array, Params], Variables]:
        def loss_of_params(params: Params) -> tuple[jax.Array, Variables]:
            return loss({**variables, "params": params}, inputs, key)

        (value, updated), gradients = jax.value_and_grad(loss_of_params, has_aux=True)(
            variables["params"]
        )
        return (value, shard(gradients)), updated

    if parts == 1:
        (value, gradients), updated = part_gradients(inputs, key)
        return value, gradients, updated

    def add_part(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        result, updated = part_gradients(*part)
        assert not updated, "statistics of a whole batch cannot be computed from its parts"
        return jax.tree.map(jnp.add, total, result), None

    shapes, _ = jax.eval_shape(part_gradients, inputs, key)
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    keys = jax.random.split(key, parts)
    total, _ = jax.lax.scan(add_part, zeros, (_split_batch(inputs, parts), keys))
    value, gradients = jax.tree.map(lambda leaf: leaf / parts, total)
    return value, gradients, {}


def update_average(
    average: Variables | None, variables: Variables, step: jax.Array, config: ConfigDict
) -> Variables | None:
    """Update the moving average of the variables after step number `step`, counted from 0.

    With `config.ema_warmup`, the decay is (1 + step) / (10 + step) while that is less than
    `config.ema_decay`, so that the average also follows the weights of a short run.

    Args:
      average: the average before the step; None if the run keeps none.
      variables: the variables after the step.
      step: number of the step, an integer scalar.
      config: the whole config; `ema_decay` and `ema_warmup` are read.

    Returns:
      The new average with the dtypes of the old one, or None. Integers, such as counts, are copied.

    Source: `num_updates` of TensorFlow's ExponentialMovingAverage.
    """
    if average is None:
        return None
    decay = config.ema_decay
    if config.ema_warmup:
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def average_leaf(new: jax.Array, old: jax.Array) -> jax.Array:
        if jnp.issubdtype(new.dtype, jnp.integer):  # a count
            return new
        # With `ema_warmup`, `decay` is an array whose dtype may be wider than the weights'.
        return optax.incremental_update(new, old, 1 - decay).astype(old.dtype)

    return jax.tree.map(average_leaf, variables, average)


def make_train_step(
    task: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    replicate: Callable[[Variables], Variables] = _identity,
    shard: Callable[[Params], Params] = _identity,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the function of one training step.

    Its random numbers depend only on `config.seed` and the state's step, so a resumed run draws the
    same ones.

    Args:
      task: prepares the inputs from a batch and computes the loss; see `Task`.
      optimizer: turns gradients into updates.
      schedule: learning rate by step, only to report it; the optimizer already applies it.
      config: the whole config; `seed`, `accumulation`, `ema_decay` and `ema_warmup` are read.
      replicate: gathers the variables, as the state keeps them, into whole copies on every device.
      shard: puts gradients where the state keeps the parameters.

    Returns:
      A function from a state and a batch to the next state and the metrics of the step: `loss`
      before the update, `learning_rate`, and the norms over all parameters, `gradient_norm` and,
      after the update, `parameter_norm`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        inputs = task.inputs(batch, jax.random.fold_in(key, 1))

        loss, gradients, updated = loss_and_gradients(
            task.loss, replicate(state.variables), inputs, key, config.accumulation, shard
        )
        old_params = state.variables["params"]
        updates, opt_state = optimizer.update(gradients, state.opt_state, old_params)
        params = optax.apply_updates(old_params, updates)
        variables = {**state.variables, **updated, "params": params}
        ema = update_average(state.ema, variables, state.step, config)

        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "gradient_norm": norm_over_all(gradients),
            "parameter_norm": norm_over_all(params),
        }
        return TrainState(state.step + 1, variables, ema, opt_state), metrics

    return train_step

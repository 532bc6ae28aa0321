"""The train step: gradient, update, average of the weights."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from activemlp_jax.utils.types import Batch, Params, Variables

# Variables, inputs and a key, to a scalar and those of the other collections that have moved.
Loss = Callable[[Variables, Any, jax.Array], tuple[jax.Array, Variables]]
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

    def weights(self) -> dict[str, Variables]:
        """The variables and their average, if there is one, by kind."""
        return {"model": self.variables} | ({} if self.ema is None else {"ema": self.ema})


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


def _same(tree: Any) -> Any:
    return tree


def _split(inputs: Any, parts: int) -> Any:
    """Arrays `[B, ...]` as `[parts, B / parts, ...]`.

    Part k has the rows k, k + parts and so on, so that every device takes its share of each part
    from the rows that it holds.
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
    shard: Callable[[Params], Params] = _same,
) -> tuple[jax.Array, Params, Variables]:
    """The loss, its gradients by the parameters, and the other collections that have changed.

    Args:
      loss: a mean over the rows of its inputs.
      variables: of the model.
      inputs: of the loss, arrays whose first axis is the batch's.
      key: of the loss's random numbers.
      parts: equal parts to take the inputs in, one after the other; their mean gradient is that of
        the whole batch. More than one is for models that change nothing but their parameters.
      shard: gradients to where the state keeps the parameters.
    """

    def of_part(inputs: Any, key: jax.Array) -> tuple[tuple[jax.Array, Params], Variables]:
        def of_params(params: Params) -> tuple[jax.Array, Variables]:
            return loss({**variables, "params": params}, inputs, key)

        (value, changed), gradients = jax.value_and_grad(of_params, has_aux=True)(
            variables["params"]
        )
        return (value, shard(gradients)), changed

    if parts == 1:
        (value, gradients), changed = of_part(inputs, key)
        return value, gradients, changed

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        found, changed = of_part(*part)
        assert not changed, "statistics of a batch are not those of its parts"
        return jax.tree.map(jnp.add, total, found), None

    shapes, _ = jax.eval_shape(of_part, inputs, key)
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    total, _ = jax.lax.scan(add, zeros, (_split(inputs, parts), jax.random.split(key, parts)))
    value, gradients = jax.tree.map(lambda leaf: leaf / parts, total)
    return value, gradients, {}


def update_average(
    average: Variables | None, variables: Variables, step: jax.Array, config: ConfigDict
) -> Variables | None:
    """The moving average of the variables after the step numbered `step`, from 0.

    With `config.ema_warmup` it decays by (1 + step) / (10 + step) where that is less than
    `config.ema_decay`, so that it follows a short run, too.

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
        # The step size of a warm-up is an array, whose dtype may be wider than the weights'.
        return optax.incremental_update(new, old, 1 - decay).astype(old.dtype)

    return jax.tree.map(average_leaf, variables, average)


def make_train_step(
    task: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    replicate: Callable[[Variables], Variables] = _same,
    shard: Callable[[Params], Params] = _same,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function of one step: state and batch to the next state and metrics of this step.

    Random numbers come from `config.seed` and the state's step alone, so a resumed run draws the
    same.

    Args:
      task: makes inputs of a batch, and the loss of inputs; see `Task`.
      optimizer: turns gradients into updates.
      schedule: the learning rate by step, for the metrics; the optimizer has it, too.
      config: the whole config; `seed`, `accumulation`, `ema_decay` and `ema_warmup` are read.
      replicate: variables as the state keeps them to what the loss needs on each device.
      shard: gradients to where the state keeps the parameters.

    Returns:
      The function. Its metrics are `loss`, before the update, `learning_rate`, and the norms over
      all parameters together `gradient_norm` and, after the update, `parameter_norm`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        inputs = task.inputs(batch, jax.random.fold_in(key, 1))

        loss, gradients, changed = loss_and_gradients(
            task.loss, replicate(state.variables), inputs, key, config.accumulation, shard
        )
        old = state.variables["params"]
        updates, opt_state = optimizer.update(gradients, state.opt_state, old)
        params = optax.apply_updates(old, updates)
        variables = {**state.variables, **changed, "params": params}
        ema = update_average(state.ema, variables, state.step, config)

        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "gradient_norm": norm_over_all(gradients),
            "parameter_norm": norm_over_all(params),
        }
        return TrainState(state.step + 1, variables, ema, opt_state), metrics

    return train_step

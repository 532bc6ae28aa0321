"""The training state, and the step that updates it: gradient, optimizer, averaged weights."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.base import Task
from activemlp_jax.utils.types import Batch, Params, Variables

Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """The state that a run carries from step to step."""

    step: jax.Array  # number of steps done, an int32 scalar
    variables: Variables  # what the model's `apply` takes: `params` and the other collections
    ema: Variables | None  # exponential moving average of all of `variables`, if the run keeps one
    opt_state: optax.OptState

    @classmethod
    def create(
        cls, variables: Variables, optimizer: optax.GradientTransformation, ema_decay: float
    ) -> "TrainState":
        """Create the state before the first step; the average starts at the initial variables."""
        ema = jax.tree.map(jnp.copy, variables) if ema_decay else None
        return cls(jnp.zeros((), jnp.int32), variables, ema, optimizer.init(variables["params"]))

    def weights(self) -> dict[str, Variables]:
        """Return the variables, keyed 'model', and their average, keyed 'ema', if there is one."""
        return {"model": self.variables} | ({} if self.ema is None else {"ema": self.ema})


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the function that runs one training step; state and batch are split over `mesh`.

    The optimizer already applies `schedule`; it is given only to report the learning rate.

    Returns:
      A function from a state and a batch to the next state and the metrics of the step. The metrics
      are `loss` before the update, `learning_rate`, `gradient_norm`, and `parameter_norm` after the
      update; both norms are over all parameters.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The key depends only on seed and step, so a resumed run draws the same random numbers.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        inputs = task.inputs(batch, jax.random.fold_in(key, 1))
        whole = sharding.gather(state.variables, mesh)

        def loss_fn(params: Params, inputs: Any, key: jax.Array) -> tuple[jax.Array, Variables]:
            return task.loss({**whole, "params": params}, inputs, key)

        def gradient_fn(inputs: Any, key: jax.Array) -> tuple[jax.Array, Variables, Params]:
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, updated), gradients = grad_fn(whole["params"], inputs, key)
            return loss, updated, sharding.scatter(gradients, mesh)

        if config.accumulation == 1:
            loss, updated, gradients = gradient_fn(inputs, key)
        else:
            # Average over equal parts of the batch, which is exact only for models without batch
            # statistics. Part k of n has the rows k, k + n and so on, so that every device holds an
            # equal share of each part.
            rows = len(jax.tree.leaves(inputs)[0]) // config.accumulation
            loss, updated, gradients = optax.microbatch(
                lambda inputs, keys: gradient_fn(inputs, keys[0]),
                argnums=(0, 1),
                microbatch_size=rows,
                accumulator=optax.microbatching.AccumulationType.MEAN,
            )(inputs, jnp.tile(jax.random.split(key, config.accumulation), rows))

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.variables["params"])
        params = optax.apply_updates(state.variables["params"], updates)
        variables = {**state.variables, **updated, "params": params}

        ema = state.ema
        if ema is not None:
            decay = config.ema_decay
            if config.ema_warmup:
                # Like TensorFlow's ExponentialMovingAverage with `num_updates`, so that the average
                # follows the weights of a short run too.
                decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            ema = update_average(ema, variables, decay)

        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "gradient_norm": global_norm(gradients),
            "parameter_norm": global_norm(params),
        }
        return TrainState(state.step + 1, variables, ema, opt_state), metrics

    return train_step


def update_average(average: Variables, variables: Variables, decay: float | jax.Array) -> Variables:
    """Compute `decay * average + (1 - decay) * variables` in `average`'s dtypes; copy integers."""

    def update(new: jax.Array, old: jax.Array) -> jax.Array:
        if jnp.issubdtype(new.dtype, jnp.integer):  # a count
            return new
        return optax.incremental_update(new, old, 1 - decay).astype(old.dtype)

    return jax.tree.map(update, variables, average)


def global_norm(tree: Any) -> jax.Array:
    """Compute the Euclidean norm over all leaves, like `optax.tree.norm` but faster to compile.

    Squares of leaves with the same shape are added before they are summed: a model has hundreds of
    leaves, and XLA on CPUs compiles every sum to three loops.
    """
    squares: dict[tuple[int, ...], list[jax.Array]] = defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        squares[leaf.shape].append(jnp.square(leaf))
    return jnp.sqrt(_total([_total(group).sum() for group in squares.values()]))


def _total(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum arrays in a balanced tree, since XLA works through a chain of additions one by one."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _total(parts[:half]) + _total(parts[half:])

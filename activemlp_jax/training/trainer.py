"""The trainer of a config on a mesh: the model, the shapes of its state, the step and the test."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.base import Source
from activemlp_jax.data.loader import sample_order
from activemlp_jax.distributed import sharding
from activemlp_jax.models.flops import count_cost
from activemlp_jax.tasks.base import Sums, Task
from activemlp_jax.tasks.registry import make_task
from activemlp_jax.training.init_from import draw_variables
from activemlp_jax.training.optimizer import make_optimizer
from activemlp_jax.training.schedules import learning_rate_schedule
from activemlp_jax.training.step import TrainState, make_train_step
from activemlp_jax.utils.types import Params, Record, Variables
from activemlp_jax.weights.architecture import Model


@dataclasses.dataclass(frozen=True)
class Trainer:
    """All that is compiled for a run; nothing in it holds arrays.

    `state` and `batch` are trees of `jax.ShapeDtypeStruct` that say where each array lies;
    `first_state` makes a state from variables, `train_step` takes a state, whose buffers it uses
    again, and a batch; both are jitted. `evaluate` takes variables by name and a `Source` of the
    task, and gives sums by name.
    """

    task: Task
    steps_per_epoch: int
    steps: int
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    first_state: Callable[[Variables], TrainState]
    train_step: Any
    evaluate: Callable[[Mapping[str, Variables], Any], dict[str, Sums]]

    @property
    def model(self) -> Model:
        """The model of the task."""
        return self.task.model

    @property
    def epochs(self) -> int:
        """Number of epochs, counting a partial last one."""
        return -(-self.steps // self.steps_per_epoch)

    def test(self, state: TrainState, source: Source) -> tuple[Record, Sums]:
        """Metrics of the weights and of their average, and the sums of the last of these."""
        names = {"model": "test", "ema": "ema_test"}
        weights = {names[kind]: variables for kind, variables in state.weights().items()}
        sums = self.evaluate(weights, source)
        record = {
            f"{name}_{key}": value
            for name in weights
            for key, value in self.task.metrics(sums[name]).items()
        }
        return record, sums[list(weights)[-1]]

    def score(self, sums: Sums) -> float:
        """The metric, in percent, by which states are compared."""
        return self.task.metrics(sums)[self.task.score]


def build_trainer(config: ConfigDict, num_classes: int, examples: int, mesh: Mesh) -> Trainer:
    """The trainer of a run.

    Args:
      config: the whole config, checked.
      num_classes: of the data set.
      examples: of its training part.
      mesh: to run on, or to compile for.

    Raises:
      UserError: a batch size that the devices cannot share, or that is more than an epoch.
    """
    parts = {"batch_size": config.accumulation, "eval_batch_size": 1}
    for key, number in parts.items():
        sharding.check_batch_size(key, config[key], mesh.size, number)
    steps_per_epoch = sample_order(config, examples).steps_per_epoch
    steps = config.steps or config.epochs * steps_per_epoch
    task = make_task(config, num_classes)
    model = task.model
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, steps, config.batch_size)
    optimizer = make_optimizer(config.optimizer, schedule, model)

    def create(variables: Variables) -> TrainState:
        return TrainState.create(variables, optimizer, config.ema_decay)

    shapes = jax.eval_shape(lambda: create(draw_variables(config, model)))
    places = sharding.split_over_fsdp(shapes, mesh)
    everywhere = sharding.replicated(mesh)

    def gather(variables: Variables) -> Variables:
        return jax.lax.with_sharding_constraint(variables, everywhere)

    def scatter(gradients: Params) -> Params:
        return jax.lax.with_sharding_constraint(gradients, places.variables["params"])

    train_step = make_train_step(task, optimizer, schedule, config, gather, scatter)
    return Trainer(
        task,
        steps_per_epoch,
        steps,
        jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            places,
        ),
        sharding.place_rows(task.batch_shapes(), mesh),
        jax.jit(create, out_shardings=places),
        jax.jit(
            sharding.on_mesh(train_step, mesh),
            donate_argnums=0,
            out_shardings=(places, everywhere),
        ),
        task.make_test(mesh, config.eval_batch_size, config.data.num_threads, gather),
    )


def train_flops(config: ConfigDict, model: Model) -> float:
    """Floating point operations that a training step needs, by the model's multiply-adds.

    Forward once and backward twice; what is computed again to save memory does not count.
    """
    size = config.data.image_size
    return 6.0 * count_cost(model, size, size).macs * config.batch_size

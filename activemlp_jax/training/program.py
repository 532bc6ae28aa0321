"""What a config compiles to on a mesh: the model, its state's shapes, the steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.pipeline import sample_order
from activemlp_jax.models.backbone import ActiveMLP
from activemlp_jax.models.counting import count_cost
from activemlp_jax.training import sharding
from activemlp_jax.training.config import build_model
from activemlp_jax.training.optimizer import make_optimizer
from activemlp_jax.training.pretrained import draw_params
from activemlp_jax.training.schedules import learning_rate_schedule
from activemlp_jax.training.step import Batch, Metrics, Params, TrainState, make_train_step
from activemlp_jax.training.tasks import Classification


@dataclasses.dataclass(frozen=True)
class Program:
    """A run, ready to be compiled; nothing in it holds arrays.

    `state` and `batch` are trees of `jax.ShapeDtypeStruct` that say where each array lies;
    `first_state` makes a state from parameters, `train_step` takes a state, whose buffers it uses
    again, and a batch, and `count` parameters and a batch; all three are jitted.
    """

    model: ActiveMLP
    task: Classification
    steps_per_epoch: int
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    first_state: Callable[[Params], TrainState]
    train_step: Any
    count: Callable[[Params, Batch], dict[str, jax.Array]]


def build_program(config: ConfigDict, num_classes: int, examples: int, mesh: Mesh) -> Program:
    """The program of a run.

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
    model = build_model(config, num_classes)
    task = Classification(model, config.data.mean, config.data.std, config)
    schedule = learning_rate_schedule(
        config.optimizer, steps_per_epoch, config.epochs, config.batch_size
    )
    optimizer = make_optimizer(config.optimizer, schedule, model)

    def create(params: Params) -> TrainState:
        return TrainState.create(params, optimizer, config.ema_decay)

    shapes = jax.eval_shape(lambda: create(draw_params(config, model)))
    places = sharding.split_over_fsdp(shapes, mesh)
    everywhere = sharding.replicated(mesh)

    def gather(params: Params) -> Params:
        return jax.lax.with_sharding_constraint(params, everywhere)

    def scatter(gradients: Params) -> Params:
        return jax.lax.with_sharding_constraint(gradients, places.params)

    update = make_train_step(
        task.loss,
        optimizer,
        config.ema_decay,
        config.seed,
        inputs=task.inputs,
        accumulation=config.accumulation,
        gather=gather,
        scatter=scatter,
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rate = schedule(state.step)
        state, metrics = update(state, batch)
        return state, {**metrics, "learning_rate": rate}

    return Program(
        model,
        task,
        steps_per_epoch,
        jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            places,
        ),
        sharding.batch_shapes(config.batch_size, config.data.image_size, mesh),
        jax.jit(create, out_shardings=places),
        jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere)),
        jax.jit(lambda params, batch: task.count(gather(params), batch), out_shardings=everywhere),
    )


def train_flops(config: ConfigDict, model: ActiveMLP) -> float:
    """Floating point operations that a training step needs, by the model's multiply-adds.

    Forward once and backward twice; what is computed again to save memory does not count.
    """
    size = config.data.image_size
    return 6.0 * count_cost(model, size, size).macs * config.batch_size

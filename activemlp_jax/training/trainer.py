"""The trainer, which compiles a config's functions for a mesh, and the run that uses it."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import activemlp_jax
from activemlp_jax.data.base import Source, check_same_classes
from activemlp_jax.data.loader import sample_order
from activemlp_jax.distributed import hosts, sharding
from activemlp_jax.models.flops import count_cost
from activemlp_jax.models.segmentor import Model
from activemlp_jax.tasks.base import Sums, Task, Test
from activemlp_jax.tasks.registry import TASKS, make_task, open_data
from activemlp_jax.training.config import check_config, flatten
from activemlp_jax.training.init_from import adopt_architecture, draw_variables
from activemlp_jax.training.optimizer import make_optimizer
from activemlp_jax.training.schedules import learning_rate_schedule
from activemlp_jax.training.step import TrainState, make_train_step
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Record, Variables


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a run and the shapes they work on; holds no arrays."""

    task: Task
    mesh: Mesh
    steps_per_epoch: int
    steps: int  # of the whole run
    state: TrainState  # of `jax.ShapeDtypeStruct`, with shardings
    batch: dict[str, jax.ShapeDtypeStruct]
    first_state: Callable[[Variables], TrainState]  # from the initial variables
    train_step: Any  # from state and batch to state and metrics; donates the state's buffers
    evaluate: Test

    @property
    def model(self) -> Model:
        """Model of the task."""
        return self.task.model

    @property
    def epochs(self) -> int:
        """Number of epochs, counting a partial last one."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def step_flops(self) -> float:
        """Floating-point operations of a training step, from the model's multiply-adds.

        The backward pass counts as two forward passes; recomputation to save memory is left out.
        """
        config = self.task.settings
        size = config.data.image_size
        return 6.0 * count_cost(self.model, size, size).macs * config.batch_size

    def test(self, state: TrainState, source: Source) -> tuple[Record, Sums]:
        """Evaluate a state's variables and, if the run keeps one, their average.

        Returns the metrics, with keys such as 'test_loss' and 'ema_test_loss', and the sums for the
        average if there is one, else for the variables.
        """
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
        """Compute from `sums` the metric that ranks the states of a run, in percent."""
        return self.task.metrics(sums)[self.task.score]


def build_trainer(config: ConfigDict, num_classes: int, examples: int, mesh: Mesh) -> Trainer:
    """Build the trainer of a run with a checked config and `examples` training examples.

    Raises UserError if the batch size does not fit the devices or the examples.
    """
    for key, parts in {"batch_size": config.accumulation, "eval_batch_size": 1}.items():
        if config[key] % (mesh.size * parts):
            taken = f", taken in {parts} parts" if parts > 1 else ""
            raise UserError(
                f"config.{key} is {config[key]}, expected a multiple of {mesh.size * parts}: "
                f"there are {mesh.size} devices{taken}"
            )
    steps_per_epoch = sample_order(config, examples).steps_per_epoch
    steps = config.steps or config.epochs * steps_per_epoch
    task = make_task(config, num_classes)
    schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, steps, config.batch_size)
    optimizer = make_optimizer(config.optimizer, schedule, task.model)

    def create(variables: Variables) -> TrainState:
        return TrainState.create(variables, optimizer, config.ema_decay)

    shapes = jax.eval_shape(lambda: create(draw_variables(config, task.model)))
    shardings = sharding.split_over_fsdp(shapes, mesh)
    train_step = make_train_step(task, optimizer, schedule, config, mesh)
    return Trainer(
        task=task,
        mesh=mesh,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        ),
        batch=sharding.place_rows(task.batch_shapes(), mesh),
        first_state=jax.jit(create, out_shardings=shardings),
        train_step=jax.jit(
            sharding.on_mesh(train_step, mesh),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        ),
        evaluate=task.make_test(mesh, config.eval_batch_size, config.data.num_threads),
    )


class Run(NamedTuple):
    """Everything about a run that stays fixed while it trains."""

    config: ConfigDict
    workdir: Path
    train_source: Source
    test_source: Source
    trainer: Trainer
    config_name: str  # recorded in model directories, such as 'digits'; '' for none

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.train_source.class_names


def prepare_run(config: ConfigDict, workdir: Path, config_name: str = "") -> Run:
    """Open the data, build the trainer, and check that all hosts agree on the run.

    Raises UserError for invalid settings, unusable data, or hosts that differ. It does not access
    `workdir`.
    """
    config = adopt_architecture(config)
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train_source = open_data(config, config.data.train_split)
    test_source = open_data(config, config.data.test_split)
    names = train_source.class_names
    check_same_classes(names, test_source.class_names, f"the test set of {config.data.name}")
    TASKS[config.task].check_packages(config)  # now, not at the first image
    trainer = build_trainer(config, len(names), len(train_source), mesh)
    facts = {f"config.{key}": value for key, value in flatten(config).items()} | {
        "the version of JAX": jax.__version__,
        "the code of activemlp_jax": _code_digest(),
        "the number of devices": jax.local_device_count(),
        "the kind of device": jax.local_devices()[0].device_kind,
        "the number of images": [len(train_source), len(test_source)],
        "the digest of the class names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    hosts.check_same("the run", facts)
    return Run(config, workdir, train_source, test_source, trainer, config_name)


def _code_digest() -> str:
    """Compute a digest of this package's source files."""
    digest = hashlib.sha256()
    folder = Path(activemlp_jax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]

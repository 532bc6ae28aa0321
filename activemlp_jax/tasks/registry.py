"""The registry of tasks, with functions that find the task of a config or a model directory."""

from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.data.base import Source
from activemlp_jax.tasks.base import Options, Task
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.tasks.segmentation import Segmentation
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.model_card import ModelCard

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Segmentation)}


def make_task(config: ConfigDict, num_classes: int) -> Task:
    """Make the task of a config, with its model; raise UserError if its settings are invalid."""
    return TASKS[config.task].from_config(config, num_classes)


def open_data(config: ConfigDict, split: str) -> Source:
    """Open a split of a config's dataset; raise UserError if it is unknown or unreadable."""
    return TASKS[config.task].open_data(config.data.name, split)


def task_type(card: ModelCard, directory: object) -> type[Task]:
    """Return the task that `card` names; raise UserError if it is unknown or not for the model."""
    task = TASKS.get(card.task)
    if task is None:
        raise UserError(f"{directory} is for the task {card.task!r}, expected {', '.join(TASKS)}")
    if not isinstance(card.model, task.model_type):
        raise UserError(
            f"{directory} is for {task.name}, but has an {type(card.model).__name__}, expected an "
            f"{task.model_type.__name__}"
        )
    return task


def check_options(task: type[Task], directory: object, command: str, options: Options) -> None:
    """Raise UserError if `options` sets an option of `command` that is only for another task."""
    own_options = getattr(task, f"{command}_options")
    for other in TASKS.values():
        for name in getattr(other, f"{command}_options"):
            value: Any = options[name]
            if name not in own_options and value is not None and value is not False:
                raise UserError(
                    f"--{name.replace('_', '-')} is for {other.noun}s, but {directory} has a "
                    f"{task.noun}"
                )

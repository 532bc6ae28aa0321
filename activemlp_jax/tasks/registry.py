"""What a model can be trained for, and where the tasks differ."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.data.base import Source
from activemlp_jax.data.segmentation_sources import open_scenes
from activemlp_jax.data.sources import open_source
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.tasks.segmentation import Segmentation
from activemlp_jax.training.config import build_model, build_preprocessing

# What config.task may be: each with its model's loss and metrics, and its data sets by name.
Task = Classification | Segmentation
TASKS: dict[str, Callable[..., Any]] = {
    "classification": Classification,
    "segmentation": Segmentation,
}
OPENERS: dict[str, Callable[[str, str | None], Source]] = {
    "classification": open_source,
    "segmentation": open_scenes,
}


def make_task(config: ConfigDict, num_classes: int) -> Task:
    """The task of a config, with its model.

    Args:
      config: the whole config.
      num_classes: of the data set.

    Raises:
      UserError: settings that fit no model.
    """
    model, preprocessing = build_model(config, num_classes), build_preprocessing(config)
    return TASKS[config.task](model, preprocessing, config)


def open_data(config: ConfigDict, split: str) -> Source:
    """The split of a config's data set.

    Raises:
      UserError: an unknown name or split, or a data set that cannot be read.
    """
    return OPENERS[config.task](config.data.name, split)

"""What a model can be trained for, and where the tasks differ."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.data.base import Source
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.data.segmentation_sources import open_scenes
from activemlp_jax.data.sources import open_source
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.tasks.segmentation import Segmentation
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.architecture import Model

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


def build_model(config: ConfigDict, num_classes: int) -> Model:
    """The model of `config.model`, for segmentation under the head of `config.head`.

    Raises:
      UserError: fields that fit no model.
    """
    try:
        model = ActiveMLP(**config.model, num_classes=num_classes)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    if config.task == "classification":
        return model
    head = config.head
    try:
        return ActiveSegmentor(
            config.model.to_dict(),
            head.name,
            num_classes,
            head.channels or None,
            head.aux_channels,
            head.neck_channels,
            head.dropout_rate,
        )
    except ValueError as error:
        raise UserError(f"config.head: {error}") from error


def build_preprocessing(config: ConfigDict) -> Preprocessing | ScenePreprocessing:
    """The preprocessing of `config.data`, for evaluation.

    Raises:
      UserError: a value that cannot work.
    """
    data = config.data
    try:
        if config.task == "segmentation":
            sides = data.scene.long_side, data.scene.short_side
            return ScenePreprocessing(*sides, data.image_size, data.mean, data.std)
        return Preprocessing(data.image_size, data.resize_factor, data.mean, data.std)
    except ValueError as error:
        raise UserError(f"config.data.{error}") from error


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

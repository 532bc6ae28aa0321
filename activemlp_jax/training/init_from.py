"""Initial variables of a run: random, or loaded from a model directory."""

import logging
from collections.abc import Sequence
from functools import partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.models.segmentor import Model
from activemlp_jax.tasks.base import Task
from activemlp_jax.tasks.registry import TASKS
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.torch_files import choose_kind

log = logging.getLogger(__name__)


def adopt_architecture(config: ConfigDict) -> ConfigDict:
    """Return a copy of `config` with the architecture of the model directory `config.init_from`.

    A segmentation model there also sets the head in the config; a classifier leaves it unchanged.

    Raises:
      UserError: `init_from` is not a model directory, or the task cannot start from its model.
    """
    if not config.init_from:
        return config
    config = config.copy_and_resolve_references()
    TASKS[config.task].adopt(config, read_card(config.init_from))
    return config


def draw_variables(config: ConfigDict, model: Model) -> Variables:
    """Initialize a model's variables randomly with `config.seed`."""
    images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return dict(model.init(jax.random.key(config.seed), images))


def initial_variables(config: ConfigDict, task: Task) -> Variables:
    """Initialize variables randomly, or load those of the model directory `config.init_from`.

    Random initialization runs on one device, so that one program in JAX's compilation cache serves
    any number of devices.

    If the loaded model has a different number of classes, the layers that depend on that number are
    initialized randomly. From a classifier, a segmentation model takes only the backbone.

    Returns:
      The variables as numpy arrays; loaded ones become float32, apart from integers.

    Raises:
      UserError: the directory is incomplete or has no weights of kind `config.init_weights`.
    """
    model = task.model
    if not config.init_from:
        return jax.device_get(jax.jit(partial(draw_variables, config, model))())

    def draw(paths: Sequence[tuple[str, ...]]) -> list[Any]:
        """Initialize only the subtrees at `paths`; XLA eliminates the code for the others."""

        def subtrees() -> list[Any]:
            variables = draw_variables(config, model)
            return [reduce(getitem, path, variables) for path in paths]

        return jax.device_get(jax.jit(subtrees)())

    card = read_card(config.init_from)
    kind = card.default_kind
    if config.init_weights != "auto":
        kind = choose_kind(card.kinds, config.init_weights, config.init_from)
    variables = jax.tree.map(
        lambda leaf: leaf if leaf.dtype.kind == "i" else leaf.astype(np.float32),
        read_weights(config.init_from, card, kind),
    )
    variables, head = task.start_from(card, variables, draw)
    log.info(f"starting from the {kind} weights in {config.init_from}: {head}")
    return variables

"""The variables that a run starts from: random, or those of a model directory."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.tasks.base import Task
from activemlp_jax.tasks.registry import TASKS
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import read_card, read_weights
from activemlp_jax.weights.torch_files import choose_kind


def adopt_architecture(config: ConfigDict) -> ConfigDict:
    """`config` with the architecture of the model directory `config.init_from`, if it names one.

    A segmentation model gives its head, too; under a classifier's backbone stays the config's head.

    Raises:
      UserError: it is not a model directory, or not one that the task can start from.
    """
    if not config.init_from:
        return config
    config = config.copy_and_resolve_references()
    TASKS[config.task].adopt(config, read_card(config.init_from))
    return config


def draw_variables(config: ConfigDict, model: Model) -> Variables:
    """Random parameters, from `config.seed`, and for segmentation untouched statistics."""
    images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return dict(model.init(jax.random.key(config.seed), images))


def initial_variables(config: ConfigDict, task: Task, say: Callable[[str], None]) -> Variables:
    """The variables to start from: random, or those of the model directory `config.init_from`.

    They are numpy arrays: random ones are drawn on one device, so that one compiled program, once
    in JAX's cache, serves any number of devices.

    What depends on the number of classes is drawn anew where there is another, and all but the
    backbone where a classifier's weights are to segment.

    Args:
      config: the whole config, after `adopt_architecture`.
      task: of the model to start.
      say: told where the weights come from.

    Raises:
      UserError: the directory is incomplete, or lacks the weights of `config.init_weights`.
    """
    model = task.model
    if not config.init_from:
        return jax.device_get(jax.jit(partial(draw_variables, config, model))())

    def draw(paths: Sequence[tuple[str, ...]]) -> list[Any]:
        """Those subtrees alone, as XLA leaves the others out."""

        def parts() -> list[Any]:
            variables = draw_variables(config, model)
            return [reduce(getitem, path, variables) for path in paths]

        return jax.device_get(jax.jit(parts)())

    card = read_card(config.init_from)
    kind = card.default_kind
    if config.init_weights != "auto":
        kind = choose_kind(card.kinds, config.init_weights, config.init_from)
    variables = jax.tree.map(_single, read_weights(config.init_from, card, kind))
    variables, head = task.start_from(card, variables, draw)
    say(f"starting from the {kind} weights in {config.init_from}: {head}")
    return variables


def _single(leaf: np.ndarray) -> np.ndarray:
    return leaf if leaf.dtype.kind == "i" else leaf.astype(np.float32)

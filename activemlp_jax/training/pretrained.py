"""Model directories as the beginning and as the end of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.models.backbone import ActiveMLP
from activemlp_jax.training.config import build_preprocessing
from activemlp_jax.training.step import Params
from activemlp_jax.weights.model_directory import (
    ARCHITECTURE,
    ModelCard,
    read_card,
    read_weights,
    whole_or_nothing,
    write_model,
)


def adopt_architecture(config: ConfigDict) -> ConfigDict:
    """`config` with the architecture of the model directory `config.init_from`, if it names one.

    Raises:
      UserError: it is no model directory.
    """
    if not config.init_from:
        return config
    model = read_card(config.init_from).model
    config = config.copy_and_resolve_references()
    for field in ARCHITECTURE:
        value = getattr(model, field)
        is_ratio = field == "mlp_ratios"
        config.model[field] = tuple(map(float, value)) if is_ratio else value
    return config


def draw_params(config: ConfigDict, model: ActiveMLP) -> Params:
    """Random parameters, from `config.seed`."""
    images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return model.init(jax.random.key(config.seed), images)["params"]


def initial_params(config: ConfigDict, model: ActiveMLP, say: Callable[[str], None]) -> Params:
    """The parameters to start from: random, or those of the model directory `config.init_from`.

    They are numpy arrays: random ones are drawn on one device, so that one compiled program, once
    in JAX's cache, serves any number of devices.

    The head of a model with another number of classes is drawn anew.

    Args:
      config: the whole config, after `adopt_architecture`.
      model: to start.
      say: told where the weights come from.
    """
    if not config.init_from:
        return jax.device_get(jax.jit(partial(draw_params, config, model))())
    card = read_card(config.init_from)
    params = read_weights(config.init_from, card, card.default_kind)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    there, here = card.model.num_classes, model.num_classes
    head = f"head kept, {here} classes"
    if there != here:
        head_only = jax.jit(lambda: draw_params(config, model)["head"])
        params["head"] = jax.device_get(head_only())
        head = f"head re-initialised, {there} classes there and {here} here"
    say(f"starting from the {card.default_kind} weights in {config.init_from}: {head}")
    return params


def write_result(
    directory: Path,
    config: ConfigDict,
    model: ActiveMLP,
    weights: dict[str, Params],
    class_names: tuple[str, ...],
    source: dict[str, Any],
) -> None:
    """The end of a run as a model directory, in place of an older one; called by one host alone.

    Args:
      directory: to write.
      config: the whole config.
      model: trained.
      weights: numpy arrays by kind, 'ema' before 'model' where there is an average.
      class_names: by label.
      source: where the weights come from, as JSON takes it.
    """
    kinds = tuple(weights)
    card = ModelCard(model, build_preprocessing(config), kinds, kinds[0], class_names, source)
    with whole_or_nothing(directory) as place:
        write_model(place, card, weights)

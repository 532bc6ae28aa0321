"""Model directories as the beginning and as the end of a run."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.tasks.registry import Task
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import (
    ARCHITECTURE,
    HEAD,
    ModelCard,
    backbone,
    read_card,
    read_weights,
    write_model,
)
from activemlp_jax.weights.torch_files import choose_kind
from activemlp_jax.weights.torch_names import BACKBONE, Path, variable_shapes

# Parts of a tree of parameters that depend on the number of classes; each is drawn anew as a whole.
CLASSIFIERS = (
    ("params", "head"),
    ("params", "decode_head", "classifier"),
    ("params", "auxiliary_head", "classifier"),
)


def adopt_architecture(config: ConfigDict) -> ConfigDict:
    """`config` with the architecture of the model directory `config.init_from`, if it names one.

    A segmentation model gives its head's too. To segment by the backbone of a classifier, the head
    is that of the config.

    Raises:
      UserError: it is no model directory, or one of a segmentation model where a classifier is to
        be trained.
    """
    if not config.init_from:
        return config
    card = read_card(config.init_from)
    if card.is_segmentor and config.task == "classification":
        raise UserError(
            f"config.init_from is {config.init_from}, a segmentation model, and config.task is "
            "classification, expected the directory of a classifier"
        )
    config = config.copy_and_resolve_references()
    for field in ARCHITECTURE:
        value = getattr(backbone(card.model), field)
        is_ratio = field == "mlp_ratios"
        config.model[field] = tuple(map(float, value)) if is_ratio else value
    if card.is_segmentor:
        for field in HEAD:
            config.head["name" if field == "head" else field] = getattr(card.model, field)
    return config


def draw_variables(config: ConfigDict, model: Model) -> Variables:
    """Random parameters, from `config.seed`, and for segmentation untouched statistics."""
    images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return dict(model.init(jax.random.key(config.seed), images))


def initial_variables(config: ConfigDict, model: Model, say: Callable[[str], None]) -> Variables:
    """The variables to start from: random, or those of the model directory `config.init_from`.

    They are numpy arrays: random ones are drawn on one device, so that one compiled program, once
    in JAX's cache, serves any number of devices.

    What depends on the number of classes is drawn anew where there is another, and all but the
    backbone where a classifier's weights are to segment.

    Args:
      config: the whole config, after `adopt_architecture`.
      model: to start.
      say: told where the weights come from.

    Raises:
      UserError: the directory is incomplete, or lacks the weights of `config.init_weights`.
    """
    if not config.init_from:
        return jax.device_get(jax.jit(partial(draw_variables, config, model))())

    def draw(paths: Sequence[Path]) -> list[Any]:
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
    there, here = card.model.num_classes, model.num_classes
    if isinstance(model, ActiveSegmentor) and not card.is_segmentor:
        variables = _under_new_head(variables, model, draw)
        head = "the backbone, under a new head"
    elif there != here:
        there_are = [path for path in CLASSIFIERS if _has(variables, path)]
        for path, drawn in zip(there_are, draw(there_are), strict=True):
            reduce(getitem, path[:-1], variables)[path[-1]] = drawn
        head = f"head re-initialised, {there} classes there and {here} here"
    else:
        head = f"head kept, {here} classes"
    say(f"starting from the {kind} weights in {config.init_from}: {head}")
    return variables


def _single(leaf: np.ndarray) -> np.ndarray:
    return leaf if leaf.dtype.kind == "i" else leaf.astype(np.float32)


def _has(tree: Any, path: Path) -> bool:
    return not path or (path[0] in tree and _has(tree[path[0]], path[1:]))


def _under_new_head(
    classifier: Variables, model: ActiveSegmentor, draw: Callable[[Sequence[Path]], list[Any]]
) -> Variables:
    """A segmentor's variables: a classifier's backbone, and all else drawn."""
    new = {path[:2] for path in variable_shapes(model)}
    names = {path[2] for path in variable_shapes(model) if path[1] == BACKBONE}
    paths = sorted(new - {("params", BACKBONE)})
    variables: Variables = {"params": {}, "batch_stats": {}}
    for (collection, name), drawn in zip(paths, draw(paths), strict=True):
        variables[collection][name] = drawn
    variables["params"][BACKBONE] = {name: classifier["params"][name] for name in names}
    return variables


def write_result(
    directory: pathlib.Path,
    task: Task,
    weights: dict[str, Variables],
    class_names: tuple[str, ...],
    source: dict[str, Any],
) -> None:
    """The end of a run as a model directory, in place of an older one; called by one host alone.

    Args:
      directory: to write.
      task: with the model that was trained, and its preprocessing.
      weights: numpy arrays by kind, 'ema' before 'model' where there is an average.
      class_names: by label.
      source: where the weights come from, as JSON takes it.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    kinds = tuple(weights)
    card = ModelCard(task.model, task.preprocessing, kinds, kinds[0], class_names, source)
    try:
        with write_directory_aside(directory) as place:
            write_model(place, card, weights)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error

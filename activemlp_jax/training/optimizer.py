"""Optimizers by name, with the original's weight decay groups, clipping and layer-wise decay."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from activemlp_jax.models.segmentor import Model, backbone
from activemlp_jax.weights.torch_names import BACKBONE

NOT_DECAYED = ("vectors", "norms")  # the values of `config.optimizer.not_decayed`


def decay_mask(params: Any, not_decayed: str = "vectors") -> Any:
    """Make a tree of bools like `params` that tells whether weight decay applies to each leaf.

    With 'vectors', 1-D parameters (biases and norms) and positional convolutions (PEG) do not
    decay, as in the original for classification. With 'norms', the LayerNorms of the blocks and of
    the maps that the head reads do not decay, as in the original for segmentation. All others
    decay, including the norms of offset layers, batch norms, biases and positional convolutions.

    Source: the original's parameter groups; for segmentation, they exempt names with 'norm'.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = [key.key for key in path]
        if not_decayed == "norms":
            return not any(re.fullmatch(r"norm\d|norms_\d", name) for name in names)
        return leaf.ndim > 1 and "peg" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, model: Model, decay: float) -> Any:
    """Compute a tree like `params` of learning rate factors, for layer-wise decay.

    The factor is 1 for the head and its norm, `decay` for the last block, `decay ** 2` for the
    block before it, and so on down to the stem. The positional convolution (PEG) of a stage has the
    factor of the stage's first block, and the downsampling after a stage that of its last block. In
    a segmentation model, the backbone has the same factors.

    Source: the layer-wise decay in the fine-tuning of BEiT and its successors.
    """
    depths = backbone(model).depths
    starts = [sum(depths[:stage]) for stage in range(5)]
    blocks = starts[-1]

    def scale(path: tuple[Any, ...], _: Any) -> float:
        names = [key.key for key in path if key.key != BACKBONE]
        top, inner, *_ = (*names, "")
        kind, _, number = top.partition("_")
        if kind == "stages":
            index = inner.removeprefix("block_") if inner.startswith("block_") else 0
            block = starts[int(number)] + int(index)
        elif kind == "downsamples":
            block = starts[int(number) + 1] - 1
        else:
            block = -1 if kind == "stem" else blocks
        return decay ** (blocks - block)

    return jax.tree_util.tree_map_with_path(scale, params)


def adamw(
    config: ConfigDict, schedule: optax.Schedule, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Make AdamW, with decoupled weight decay of the parameters that `mask` marks."""
    settings = {key: config[key] for key in ("b1", "b2", "eps", "weight_decay")}
    return optax.adamw(schedule, **settings, mask=mask)


OPTIMIZERS = {"adamw": adamw}  # the values of `config.optimizer.name`


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, model: Model
) -> optax.GradientTransformation:
    """Make the optimizer that `config` describes; `config` is the section `optimizer`."""
    mask = partial(decay_mask, not_decayed=config.not_decayed)
    transforms = [OPTIMIZERS[config.name](config, schedule, mask)]
    if config.clip_norm:
        transforms.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay < 1:

        def scale_updates(updates: Any, params: Any) -> Any:
            scales = layer_scales(params, model, config.layer_decay)
            return jax.tree.map(lambda update, scale: update * scale, updates, scales)

        transforms.append(optax.stateless(scale_updates))
    return optax.chain(*transforms) if len(transforms) > 1 else transforms[0]

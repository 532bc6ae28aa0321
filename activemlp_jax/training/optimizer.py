"""AdamW with the original's groups of decayed weights."""

import re
from functools import partial
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from activemlp_jax.weights.architecture import Model, backbone
from activemlp_jax.weights.torch_names import BACKBONE


def decay_mask(params: Any, not_decayed: str = "vectors") -> Any:
    """True for the weights that decay.

    Args:
      params: the tree of parameters.
      not_decayed: 'vectors' keeps vectors, biases and position convolutions from decaying, as the
        original does for classification; 'norms' the LayerNorms of blocks and of the maps for the
        head, as it does for segmentation: but not those of the offset layers, nor batch norms,
        biases or position convolutions.

    Source: the original's parameter groups; for segmentation those whose names have 'norm' in them.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = [key.key for key in path]
        if not_decayed == "norms":
            return not any(re.fullmatch(r"norm\d|norms_\d", name) for name in names)
        return leaf.ndim > 1 and "peg" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, model: Model, decay: float) -> Any:
    """For each parameter, the share of the learning rate it gets: `decay` a block from the head.

    The head and its norm get 1, the last block `decay`, the one before `decay ** 2` and so on down
    to the stem. What a stage's blocks share, its position convolution, goes with its first block,
    the downsampling after a stage with its last. Under a segmentation head, the backbone likewise.

    Source: the layer-wise decay of BEiT and its successors' fine-tuning.
    """
    depths = backbone(model).depths
    starts = [sum(depths[:stage]) for stage in range(5)]
    blocks = starts[-1]

    def scale(path: tuple[Any, ...], _: Any) -> float:
        names = [key.key for key in path if key.key != BACKBONE]
        top, inner, *_ = (*names, "")
        kind, _, number = top.partition("_")
        if kind == "stages":
            within = inner.removeprefix("block_") if inner.startswith("block_") else 0
            block = starts[int(number)] + int(within)
        elif kind == "downsamples":
            block = starts[int(number) + 1] - 1
        else:
            block = -1 if kind == "stem" else blocks
        return decay ** (blocks - block)

    return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, model: Model
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, and where asked for, clipping and layer-wise decay.

    Args:
      config: `config.optimizer`.
      schedule: of the learning rate.
      model: whose parameters are trained.
    """
    parts = [
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=partial(decay_mask, not_decayed=config.not_decayed),
        )
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay < 1:

        def scaled(updates: Any, params: Any) -> Any:
            scales = layer_scales(params, model, config.layer_decay)
            return jax.tree.map(lambda update, scale: update * scale, updates, scales)

        parts.append(optax.stateless(scaled))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]

"""Infer the model from the keys and shapes of a PyTorch state dict."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from activemlp_jax.models.active_mlp import ActiveMLP, create_model, list_models
from activemlp_jax.models.segmentor import ActiveSegmentor

Model = ActiveMLP | ActiveSegmentor
Shapes = Mapping[str, Any]  # PyTorch names to objects with a `shape`

MAX_BLOCKS = 500  # in all stages together; published variants have up to 41
MAX_ROWS = 2**20  # first dimension of a weight: features, hidden features or classes
MAX_KEY_LENGTH = 100  # characters of a key in an error


def backbone(model: Model) -> ActiveMLP:
    """Return the backbone of `model`: a classifier itself, or the ActiveMLP of a segmentor."""
    return ActiveMLP(**model.backbone) if isinstance(model, ActiveSegmentor) else model


def variant_name(model: Model) -> str | None:
    """Return the published variant of the backbone, or None; the number of classes is ignored."""
    network = backbone(model)
    plain = network.clone(drop_path_rate=0.0, dtype=jnp.float32, remat_stages=())
    same = (name for name in list_models() if create_model(name, network.num_classes) == plain)
    return next(same, None)


def describe_architecture(model: Model) -> str:
    """Describe the variant, the head and the size of a model, for errors."""
    network = backbone(model)
    name = variant_name(model) or "an ActiveMLP of no published variant"
    head = f" under {model.head}" if isinstance(model, ActiveSegmentor) else ""
    depths, dims = tuple(network.depths), tuple(network.embed_dims)
    return f"{name}{head} (depths {depths}, embed_dims {dims})"


def is_segmentor(state_dict: Shapes) -> bool:
    """Return whether the state dict is from a segmentation model."""
    return any(key.startswith(("backbone.", "decode_head.")) for key in state_dict)


def infer_model(state_dict: Shapes) -> Model:
    """Infer the model that a state dict belongs to.

    Args:
      state_dict: PyTorch names to arrays or tensors; only the shapes are used.

    Returns:
      An `ActiveMLP` or an `ActiveSegmentor`, without parameters.

    Raises:
      ValueError: a required key is missing or has an impossible shape; the message names it.
    """
    if not is_segmentor(state_dict):
        fields = infer_architecture(state_dict)
        return ActiveMLP(**fields, num_classes=_rows(state_dict, "head.weight"))
    fields = {
        "backbone": infer_architecture(state_dict, "backbone."),
        "num_classes": _rows(state_dict, "decode_head.conv_seg.weight"),
    }
    if any(key.startswith("neck.") for key in state_dict):
        return ActiveSegmentor(
            **fields,
            head="fpn",
            channels=_rows(state_dict, "decode_head.scale_heads.0.0.conv.weight"),
            neck_channels=_rows(state_dict, "neck.lateral_convs.0.conv.weight"),
        )
    return ActiveSegmentor(
        **fields,
        channels=_rows(state_dict, "decode_head.bottleneck.conv.weight"),
        aux_channels=_rows(state_dict, "auxiliary_head.convs.0.conv.weight"),
    )


def list_keys(keys: list[str], limit: int = 8) -> str:
    """Join the first `limit` keys, long ones truncated, and say how many more there are."""
    text = ", ".join(key[:MAX_KEY_LENGTH] for key in keys[:limit])
    return f"{text} and {len(keys) - limit} more" if len(keys) > limit else text


def _rows(state_dict: Shapes, key: str) -> int:
    """Return the first dimension of a weight; raises ValueError if it is missing or invalid."""
    if key not in state_dict:
        keys = f"found {list_keys(list(state_dict), 3)}" if state_dict else "it is empty"
        raise ValueError(f"the state dict misses {key}, which every such model has; {keys}")
    shape = tuple(state_dict[key].shape)
    if not shape or 0 in shape:
        raise ValueError(f"{key} has shape {shape}, which no ActiveMLP has")
    if shape[0] > MAX_ROWS:
        raise ValueError(f"{key} has {shape[0]:,} rows, expected at most {MAX_ROWS:,}")
    return shape[0]


def count_depths(blocks: set[tuple[int, int]]) -> tuple[int, ...]:
    """Return the number of blocks of each stage, given all (stage, block) indices."""
    return tuple(1 + max((j for i, j in blocks if i == stage), default=-1) for stage in range(4))


def _ratio(hidden: int, dim: int) -> float:
    """Return a ratio with `int(dim * ratio) == hidden`, as an integer if possible."""
    if hidden % dim == 0:
        return hidden // dim
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def infer_architecture(state_dict: Shapes, prefix: str = "") -> dict[str, Any]:
    """Infer the architecture of an ActiveMLP, with or without its head.

    Args:
      state_dict: PyTorch names to arrays or tensors; only the shapes are used.
      prefix: what precedes the ActiveMLP's names in the state dict.

    Returns:
      The five keyword arguments of `ActiveMLP` that define its architecture. If several values of
      `offset_interval` give the same network, the smallest of them.

    Raises:
      ValueError: a required key is missing or has an impossible shape; the message names it.
    """
    block_pattern = re.escape(prefix) + r"blocks\.(\d)\.(\d{1,9})\."
    matches = (re.match(block_pattern, key) for key in state_dict)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    depths = count_depths(blocks)
    for stage, depth in enumerate(depths):
        count = sum(i == stage for i, _ in blocks)
        if count != depth:
            raise ValueError(f"stage {stage} has a block {depth - 1}, but only {count} blocks")
    if sum(depths) > MAX_BLOCKS:
        raise ValueError(f"there are {sum(depths)} blocks, expected at most {MAX_BLOCKS}")
    embed_dims, mlp_ratios, share_dims = [], [], []
    for stage in range(4):
        dim = _rows(state_dict, f"{prefix}blocks.{stage}.0.norm1.weight")
        hidden = _rows(state_dict, f"{prefix}blocks.{stage}.0.mlp.fc1.weight")
        offsets = _rows(state_dict, f"{prefix}blocks.{stage}.0.offset_layer.1.weight")
        embed_dims.append(dim)
        mlp_ratios.append(_ratio(hidden, dim))
        share_dims.append(2 * dim // offsets)

    matches = (re.match(block_pattern + r"offset_layer\.", key) for key in state_dict)
    offset_layers = {(int(match[1]), int(match[2])) for match in matches if match}

    def count_mismatches(interval: int) -> int:
        expected = {(i, j) for i in range(4) for j in range(0, depths[i] - 1, interval)}
        return len(offset_layers ^ expected)

    return {
        "depths": depths,
        "embed_dims": tuple(embed_dims),
        "mlp_ratios": tuple(mlp_ratios),
        "share_dims": tuple(share_dims),
        "offset_interval": min(range(1, max(depths) + 1), key=count_mismatches),
    }

"""Which model weights are of, read off the keys and shapes of a PyTorch state dict."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from activemlp_jax.models.active_mlp import ActiveMLP, create_model, list_models
from activemlp_jax.models.segmentor import ActiveSegmentor

Model = ActiveMLP | ActiveSegmentor
Shapes = Mapping[str, Any]  # PyTorch names to what has a shape

MOST_BLOCKS = 500  # in all stages; published variants have up to 41
MOST_ROWS = 2**20  # of a weight: features, hidden features or classes
MOST_CHARACTERS = 100  # of a key in an error


def backbone(model: Model) -> ActiveMLP:
    """The backbone that `model` is, or has under its head."""
    return ActiveMLP(**model.backbone) if isinstance(model, ActiveSegmentor) else model


def variant_name(model: Model) -> str | None:
    """The published variant that `model` is or has under its head, at any number of classes."""
    there = backbone(model)
    plain = there.clone(drop_path_rate=0.0, dtype=jnp.float32, remat_stages=())
    same = (name for name in list_models() if create_model(name, there.num_classes) == plain)
    return next(same, None)


def describe_architecture(model: Model) -> str:
    """The variant, the shape and the head of a model, for errors."""
    there = backbone(model)
    name = variant_name(model) or "an ActiveMLP of no published variant"
    head = f" under {model.head}" if isinstance(model, ActiveSegmentor) else ""
    depths, dims = tuple(there.depths), tuple(there.embed_dims)
    return f"{name}{head} (depths {depths}, embed_dims {dims})"


def is_segmentor(state_dict: Shapes) -> bool:
    """Whether these are the weights of a segmentation model."""
    return any(key.startswith(("backbone.", "decode_head.")) for key in state_dict)


def infer_model(state_dict: Shapes) -> Model:
    """The model whose weights these are.

    Args:
      state_dict: PyTorch names to arrays or tensors; only shapes are looked at.

    Raises:
      ValueError: a key that every such model has is missing or has a shape that none has, named.
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


def list_keys(keys: list[str], most: int = 8) -> str:
    """The first of them, cut where they are long, and how many more there are."""
    shown = ", ".join(key[:MOST_CHARACTERS] for key in keys[:most])
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown


def _rows(state_dict: Shapes, key: str) -> int:
    """The first size of a weight; none has a size of zero."""
    if key not in state_dict:
        found = f"found {list_keys(list(state_dict), 3)}" if state_dict else "it is empty"
        raise ValueError(f"the state dict misses {key}, which every such model has; {found}")
    shape = tuple(state_dict[key].shape)
    if not shape or 0 in shape:
        raise ValueError(f"{key} has shape {shape}, which no ActiveMLP has")
    if shape[0] > MOST_ROWS:
        raise ValueError(f"{key} has {shape[0]:,} rows, expected at most {MOST_ROWS:,}")
    return shape[0]


def count_depths(blocks: set[tuple[int, int]]) -> tuple[int, ...]:
    """Blocks a stage, from the (stage, block) numbers that occur."""
    return tuple(1 + max((j for i, j in blocks if i == stage), default=-1) for stage in range(4))


def _ratio(hidden: int, dim: int) -> float:
    """The ratio for which `int(dim * ratio) == hidden`; an integer where it is one."""
    if hidden % dim == 0:
        return hidden // dim
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def infer_architecture(state_dict: Shapes, prefix: str = "") -> dict[str, Any]:
    """The shape of the ActiveMLP whose weights these are, with or without its head.

    Args:
      state_dict: PyTorch names to arrays or tensors; only shapes are looked at.
      prefix: of the names that are the ActiveMLP's.

    Returns:
      The five keyword arguments of `ActiveMLP` that say its architecture. Where several
      `offset_interval`s give the same network, the smallest.

    Raises:
      ValueError: a key that every model has is missing or has a shape that none has, named.
    """
    start = re.escape(prefix) + r"blocks\.(\d)\.(\d{1,9})\."
    matches = (re.match(start, key) for key in state_dict)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    depths = count_depths(blocks)
    for stage, depth in enumerate(depths):
        count = sum(i == stage for i, _ in blocks)
        if count != depth:
            raise ValueError(f"stage {stage} has a block {depth - 1}, but only {count} blocks")
    if sum(depths) > MOST_BLOCKS:
        raise ValueError(f"there are {sum(depths)} blocks, expected at most {MOST_BLOCKS}")
    embed_dims, mlp_ratios, share_dims = [], [], []
    for stage in range(4):
        dim = _rows(state_dict, f"{prefix}blocks.{stage}.0.norm1.weight")
        hidden = _rows(state_dict, f"{prefix}blocks.{stage}.0.mlp.fc1.weight")
        offsets = _rows(state_dict, f"{prefix}blocks.{stage}.0.offset_layer.1.weight")
        embed_dims.append(dim)
        mlp_ratios.append(_ratio(hidden, dim))
        share_dims.append(2 * dim // offsets)

    matches = (re.match(start + r"offset_layer\.", key) for key in state_dict)
    made = {(int(match[1]), int(match[2])) for match in matches if match}

    def disagreement(interval: int) -> int:
        expected = {(i, j) for i in range(4) for j in range(0, depths[i] - 1, interval)}
        return len(made ^ expected)

    return {
        "depths": depths,
        "embed_dims": tuple(embed_dims),
        "mlp_ratios": tuple(mlp_ratios),
        "share_dims": tuple(share_dims),
        "offset_interval": min(range(1, max(depths) + 1), key=disagreement),
    }

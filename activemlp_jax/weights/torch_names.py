"""Convert the original's PyTorch state dicts to flax variables and back, and infer their model.

`MODULE_NAMES`, `SEGMENTATION_NAMES` and `LEAF_NAMES` hold all pairs of names. A PyTorch linear
layer stores its weight as `[out, in]` and a convolution as `[out, in / groups, k, k]`; flax stores
`[in, out]` and `[k, k, in / groups, out]`. The ATM's linear layers `atm_h` and `atm_w` are 1x1
convolutions in the original. The model is inferred from the keys and the shapes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.segmentor import ActiveSegmentor, Model, backbone
from activemlp_jax.weights.model_types import MAX_BLOCKS, MAX_ROWS, describe_architecture

# (pattern of a module's flax path, PyTorch name); LAST stands for the stage's last block.
MODULE_NAMES = (
    ("stem", "patch_embed.proj"),
    (r"stages_(\d+)/peg", r"pos_blocks.\1.proj"),
    (r"stages_(\d+)/block_(\d+)/offset_layer/norm", r"blocks.\1.\2.offset_layer.0"),
    (r"stages_(\d+)/block_(\d+)/offset_layer/linear", r"blocks.\1.\2.offset_layer.1"),
    (r"stages_(\d+)/block_(\d+)/(norm1|norm2)", r"blocks.\1.\2.\3"),
    (r"stages_(\d+)/block_(\d+)/(atm|mlp)/(\w+)", r"blocks.\1.\2.\3.\4"),
    (r"stages_(\d+)/block_(\d+)/atm/fusion/(\w+)", r"blocks.\1.\2.atm.fusion.\3"),
    (r"downsamples_(\d+)", r"blocks.\1.LAST.downsample.proj"),
    ("(norm|head)", r"\1"),
)
BACKBONE = "active_mlp"  # a segmentor's backbone in flax; `backbone` in PyTorch
SEGMENTATION_NAMES = (
    (r"norms_(\d)", r"backbone.norm_\1"),
    (r"neck/lateral_(\d)", r"neck.lateral_convs.\1.conv"),
    (r"neck/output_(\d)", r"neck.fpn_convs.\1.conv"),
    (r"decode_head/pool_(\d)/(conv|bn)", r"decode_head.psp_modules.\1.1.\2"),
    (r"decode_head/bottleneck/(conv|bn)", r"decode_head.bottleneck.\1"),
    (r"decode_head/lateral_(\d)/(conv|bn)", r"decode_head.lateral_convs.\1.\2"),
    (r"decode_head/output_(\d)/(conv|bn)", r"decode_head.fpn_convs.\1.\2"),
    (r"decode_head/fusion/(conv|bn)", r"decode_head.fpn_bottleneck.\1"),
    (r"decode_head/scale_(\d)_0/(conv|bn)", r"decode_head.scale_heads.\1.0.\2"),
    # The PyTorch index skips the original's upsampling modules, which have no weights.
    (r"decode_head/scale_(\d)_1/(conv|bn)", r"decode_head.scale_heads.\1.2.\2"),
    (r"decode_head/scale_(\d)_2/(conv|bn)", r"decode_head.scale_heads.\1.4.\2"),
    (r"auxiliary_head/hidden/(conv|bn)", r"auxiliary_head.convs.0.\1"),
    (r"(decode_head|auxiliary_head)/classifier/conv_seg", r"\1.conv_seg"),
)
LEAF_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
    ("batch_stats", "count"): "num_batches_tracked",
}
BATCH_COUNT = "num_batches_tracked"  # the only integer variable: int64 in PyTorch, int32 in flax

MAX_KEY_LENGTH = 100  # characters of a key in an error

Shapes = Mapping[str, Any]  # PyTorch names to objects with a `shape`
VariablePath = tuple[str, ...]  # the collection, then the keys in its tree


def list_keys(keys: list[str], limit: int = 3) -> str:
    """Join the first `limit` keys, long ones truncated, and say how many more there are."""
    text = ", ".join(key[:MAX_KEY_LENGTH] for key in keys[:limit])
    return f"{text} and {len(keys) - limit} more" if len(keys) > limit else text


def is_mmsegmentation(state_dict: Shapes) -> bool:
    """Return whether the keys are those of mmsegmentation, with a backbone and a head."""
    return any(key.startswith(("backbone.", "decode_head.")) for key in state_dict)


def infer_model(state_dict: Shapes) -> Model:
    """Infer the model; raise ValueError if a required key is missing or has an impossible shape."""
    if not is_mmsegmentation(state_dict):
        fields = infer_architecture(state_dict)
        return ActiveMLP(**fields, num_classes=_rows(state_dict, "head.weight"))
    network = infer_architecture(state_dict, "backbone.")
    if any(key.startswith("neck.") for key in state_dict):
        head, channels = "fpn", "decode_head.scale_heads.0.0.conv.weight"
        other = {"neck_channels": "neck.lateral_convs.0.conv.weight"}
    else:
        head, channels = "upernet", "decode_head.bottleneck.conv.weight"
        other = {"aux_channels": "auxiliary_head.convs.0.conv.weight"}
    keys = {"num_classes": "decode_head.conv_seg.weight", "channels": channels, **other}
    rows: dict[str, Any] = {field: _rows(state_dict, key) for field, key in keys.items()}
    return ActiveSegmentor(network, head, **rows)


def _rows(state_dict: Shapes, key: str) -> int:
    """Return the first dimension of a weight; raise ValueError if it is missing or invalid."""
    if key not in state_dict:
        keys = f"found {list_keys(list(state_dict))}" if state_dict else "it is empty"
        raise ValueError(f"the state dict misses {key}, which every such model has; {keys}")
    shape = tuple(state_dict[key].shape)
    if not shape or 0 in shape:
        raise ValueError(f"{key} has shape {shape}, which no ActiveMLP has")
    if shape[0] > MAX_ROWS:
        raise ValueError(f"{key} has {shape[0]:,} rows, expected at most {MAX_ROWS:,}")
    return shape[0]


def _count_depths(blocks: set[tuple[int, int]]) -> tuple[int, ...]:
    """Return the number of blocks of each stage, given all (stage, block) indices."""
    return tuple(1 + max((j for i, j in blocks if i == stage), default=-1) for stage in range(4))


def infer_architecture(state_dict: Shapes, prefix: str = "") -> dict[str, Any]:
    """Infer the fields, except `num_classes`, of the ActiveMLP whose keys start with `prefix`.

    If several values of `offset_interval` give the same network, the smallest is returned. Raises
    ValueError if a required key is missing or has an impossible shape.
    """
    blocks, offset_layers = set(), set()
    for key in state_dict:
        if match := re.match(re.escape(prefix) + r"blocks\.(\d)\.(\d{1,9})\.(\w+)", key):
            block = int(match[1]), int(match[2])
            blocks.add(block)
            if match[3] == "offset_layer":
                offset_layers.add(block)
    depths = _count_depths(blocks)
    for stage, depth in enumerate(depths):
        count = sum(i == stage for i, _ in blocks)
        if count != depth:
            raise ValueError(f"stage {stage} has a block {depth - 1}, but only {count} blocks")
    if sum(depths) > MAX_BLOCKS:
        raise ValueError(f"there are {sum(depths)} blocks, expected at most {MAX_BLOCKS}")
    embed_dims, hidden_dims, offsets = (
        [_rows(state_dict, f"{prefix}blocks.{stage}.0.{layer}.weight") for stage in range(4)]
        for layer in ("norm1", "mlp.fc1", "offset_layer.1")
    )

    def count_mismatches(interval: int) -> int:
        expected = {(i, j) for i in range(4) for j in range(0, depths[i] - 1, interval)}
        return len(offset_layers ^ expected)

    return {
        "depths": depths,
        "embed_dims": tuple(embed_dims),
        "mlp_ratios": tuple(map(_ratio, hidden_dims, embed_dims)),
        "share_dims": tuple(2 * dim // n for dim, n in zip(embed_dims, offsets, strict=True)),
        "offset_interval": min(range(1, max(depths) + 1), key=count_mismatches),
    }


def _ratio(hidden: int, dim: int) -> float:
    """Return a ratio with `int(dim * ratio) == hidden`, as an integer if possible."""
    if hidden % dim == 0:
        return hidden // dim
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def torch_name(path: VariablePath, depths: Sequence[int]) -> str:
    """Return the PyTorch name of the variable at the flax `path`, in a model with these depths."""
    collection, *module, leaf = path
    names: tuple[tuple[str, str], ...] = MODULE_NAMES + SEGMENTATION_NAMES
    prefix = ""
    if module[0] == BACKBONE:
        names, prefix, module = MODULE_NAMES, "backbone.", module[1:]
    for flax_pattern, torch_template in names:
        match = re.fullmatch(flax_pattern, "/".join(module))
        if match and (collection, leaf) in LEAF_NAMES:
            name = match.expand(torch_template)
            if "LAST" in name:
                name = name.replace("LAST", str(depths[int(match[1])] - 1))
            return f"{prefix}{name}.{LEAF_NAMES[collection, leaf]}"
    raise ValueError(f"no PyTorch name for the parameter {'/'.join(path[1:])}")


def _is_pointwise_convolution(path: VariablePath) -> bool:
    return path[-1] == "kernel" and path[-2] in ("atm_w", "atm_h")


def _to_torch_layout(path: VariablePath, value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        value = np.moveaxis(value, (-1, -2), (0, 1))
    if path[-1] == "count":
        value = value.astype(np.int64)
    return value[:, :, None, None] if _is_pointwise_convolution(path) else value


def _to_flax_layout(path: VariablePath, value: np.ndarray) -> np.ndarray:
    if _is_pointwise_convolution(path):
        value = value[:, :, 0, 0]
    if path[-1] == "count":
        value = value.astype(np.int32)
    return np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value


def _as_numpy(value: Any) -> np.ndarray:
    """Return a numpy view of an array or a PyTorch tensor."""
    if hasattr(value, "detach"):
        import torch  # installed, because the value is a tensor

        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # Tensor.numpy() does not support bfloat16
            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def variable_shapes(model: Model) -> dict[VariablePath, tuple[int, ...]]:
    """Return the shapes of all variables of `model` by flax path, without computing any values."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def from_torch(state_dict: Mapping[str, Any], model: Model | None = None) -> dict[str, Any]:
    """Convert the original's PyTorch weights to flax variables; all keys must match the model.

    Args:
      state_dict: PyTorch names to arrays or tensors, for a classifier or a segmentation model.
      model: the model that the weights are for; by default, it is inferred from the shapes.

    Returns:
      `{'params': tree}`, and for segmentation `batch_stats`: numpy arrays in flax layout, in the
      dtypes of the input, except that batch norm's counts are int32.

    Raises:
      ValueError: keys are missing or unknown, or a shape differs from the model's; the message
        names them.

    Source: the keys of the authors' released checkpoints.
    """
    try:
        found = infer_model(state_dict)
    except ValueError:
        if model is None:
            raise
        found = model  # the missing keys are named below
    model = found if model is None else model
    inferred, expected = describe_architecture(found), describe_architecture(model)
    if inferred != expected:
        raise ValueError(f"the weights are of {inferred}, expected {expected}")
    shapes = variable_shapes(model)
    names = {path: torch_name(path, backbone(model).depths) for path in shapes}
    keys = {
        "missing": [name for name in names.values() if name not in state_dict],
        "unknown": sorted(set(state_dict) - set(names.values())),
    }
    wrong = [f"{len(some)} {kind} ({list_keys(some)})" for kind, some in keys.items() if some]
    if wrong:
        raise ValueError(f"the state dict does not fit {expected}: keys {', '.join(wrong)}")
    flat = {}
    for path, name in names.items():
        value = _as_numpy(state_dict[name])
        shape = _to_torch_layout(path, np.broadcast_to(0, shapes[path])).shape
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, the model expects {shape}")
        flat[path] = _to_flax_layout(path, value)
    return traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert flax variables to the original's PyTorch weights: the exact inverse of `from_torch`.

    Args:
      variables: `{'params': tree}`, and for a segmentation model `batch_stats`.

    Returns:
      PyTorch names to contiguous numpy arrays in PyTorch layout, in the dtypes of the input, except
      that batch norm's counts are int64.

    Raises:
      ValueError: a parameter does not belong to such a model; the message names it.

    Source: the keys of the authors' released checkpoints.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    matches = (re.search(r"\bstages_(\d+)/block_(\d+)/", "/".join(path)) for path in flat)
    depths = _count_depths({(int(match[1]), int(match[2])) for match in matches if match})
    return {
        torch_name(path, depths): np.asarray(_to_torch_layout(path, np.asarray(value)), order="C")
        for path, value in flat.items()
    }

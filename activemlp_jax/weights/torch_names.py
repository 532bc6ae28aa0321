"""Names and layouts of weights: the original's PyTorch state dicts to flax variables and back.

`NAMES`, `SEGMENTATION_NAMES` and `LEAVES` are the only place that knows both sides. A PyTorch
linear stores `[out, in]`, a convolution `[out, in / groups, k, k]`; flax stores `[in, out]` and
`[k, k, in / groups, out]`. The ATM's two sampled linears are 1x1 convolutions in the original and
linears here.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from activemlp_jax.weights.architecture import (
    Model,
    backbone,
    count_depths,
    describe_architecture,
    infer_model,
    list_keys,
)

# (flax path, PyTorch name) of modules; LAST is the last block of the stage.
NAMES = (
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
BACKBONE = "active_mlp"  # of a segmentor, whose names above have `backbone.` before them
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
    # Between two of these convolutions the original has a module that only resizes.
    (r"decode_head/scale_(\d)_1/(conv|bn)", r"decode_head.scale_heads.\1.2.\2"),
    (r"decode_head/scale_(\d)_2/(conv|bn)", r"decode_head.scale_heads.\1.4.\2"),
    (r"auxiliary_head/hidden/(conv|bn)", r"auxiliary_head.convs.0.\1"),
    (r"(decode_head|auxiliary_head)/classifier/conv_seg", r"\1.conv_seg"),
)
LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
    ("batch_stats", "count"): "num_batches_tracked",
}
COUNT = "num_batches_tracked"  # the one that is an integer, of 64 bits there and 32 here

NAMED = 3  # keys in an error

Path = tuple[str, ...]  # the collection first


def torch_name(path: Path, depths: Iterable[int]) -> str:
    """The original's key of the variable at the flax `path` in a model with these `depths`."""
    collection, *module, leaf = path
    names: tuple[tuple[str, str], ...] = NAMES + SEGMENTATION_NAMES
    prefix = ""
    if module[0] == BACKBONE:
        names, prefix, module = NAMES, "backbone.", module[1:]
    for flax_pattern, torch_template in names:
        match = re.fullmatch(flax_pattern, "/".join(module))
        if match and (collection, leaf) in LEAVES:
            name = match.expand(torch_template)
            if "LAST" in name:
                last = tuple(depths)[int(match[1])] - 1
                name = name.replace("LAST", str(last))
            return f"{prefix}{name}.{LEAVES[collection, leaf]}"
    raise ValueError(f"no PyTorch name for the parameter {'/'.join(path[1:])}")


def _is_pointwise_convolution(path: Path) -> bool:
    return path[-1] == "kernel" and path[-2] in ("atm_w", "atm_h")


def _to_torch_layout(path: Path, value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    if LEAVES.get((path[0], path[-1])) == COUNT:
        value = value.astype(np.int64)
    return value[:, :, None, None] if _is_pointwise_convolution(path) else value


def _to_flax_layout(path: Path, value: np.ndarray) -> np.ndarray:
    if _is_pointwise_convolution(path):
        value = value[:, :, 0, 0]
    if path[-1] == "kernel":
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
    if LEAVES[path[0], path[-1]] == COUNT:
        value = value.astype(np.int32)
    return value


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(path, np.broadcast_to(np.zeros(()), shape)).shape


def as_numpy(value: Any) -> np.ndarray:
    """A numpy view of an array or a PyTorch tensor."""
    if hasattr(value, "detach"):
        import torch  # whose tensor it is

        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # not a type of numpy's own, which PyTorch asks for
            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def variable_shapes(model: Model) -> dict[Path, tuple[int, ...]]:
    """Shapes of all variables of `model` by flax path, the collection first; none is computed."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def from_torch(state_dict: Mapping[str, Any], model: Model | None = None) -> dict[str, Any]:
    """Flax variables from the original's PyTorch weights; nothing is left out or made up.

    Args:
      state_dict: PyTorch names to arrays or tensors, of a classifier or a segmentation model.
      model: what the weights are for; without it, the model is inferred from the shapes.

    Returns:
      `{'params': tree}`, and for segmentation `batch_stats`, of numpy arrays in flax layout and
      the dtypes given; but the counts of batch norm are int32.

    Raises:
      ValueError: keys are missing, unknown or of another shape than the model's, listed.

    Source: the keys of the authors' released checkpoints.
    """
    if model is None:
        model = infer_model(state_dict)
    else:
        _check_architecture(state_dict, model)
    shapes = variable_shapes(model)
    names = {path: torch_name(path, backbone(model).depths) for path in shapes}
    missing = [name for name in names.values() if name not in state_dict]
    unknown = sorted(set(state_dict) - set(names.values()))
    if missing or unknown:
        detail = [f"{len(missing)} missing ({list_keys(missing, NAMED)})"] if missing else []
        detail += [f"{len(unknown)} unknown ({list_keys(unknown, NAMED)})"] if unknown else []
        raise ValueError(
            f"the state dict does not fit {describe_architecture(model)}: keys {', '.join(detail)}"
        )
    flat = {}
    for path, name in names.items():
        value = as_numpy(state_dict[name])
        expected = _torch_shape(path, shapes[path])
        if value.shape != expected:
            raise ValueError(f"{name} has shape {value.shape}, the model expects {expected}")
        flat[path] = _to_flax_layout(path, value)
    return traverse_util.unflatten_dict(flat)


def _check_architecture(state_dict: Mapping[str, Any], expected: Model) -> None:
    """Raises ValueError if the weights are those of another model, as far as they tell."""
    try:
        found = describe_architecture(infer_model(state_dict))
    except ValueError:
        return  # incomplete: which keys are missing says more
    if found != describe_architecture(expected):
        raise ValueError(f"the weights are of {found}, expected {describe_architecture(expected)}")


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original's PyTorch weights from flax variables: the exact inverse of `from_torch`.

    Args:
      variables: of a classifier, `{'params': tree}`, or a segmentation model, with `batch_stats`.

    Returns:
      PyTorch names to contiguous arrays in PyTorch layout and the dtypes given; counts are int64.

    Raises:
      ValueError: a parameter that no such model has, named.

    Source: the keys of the authors' released checkpoints.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    matches = (re.search(r"\bstages_(\d+)/block_(\d+)/", "/".join(path)) for path in flat)
    depths = count_depths({(int(match[1]), int(match[2])) for match in matches if match})
    return {
        torch_name(path, depths): np.asarray(_to_torch_layout(path, np.asarray(value)), order="C")
        for path, value in flat.items()
    }

"""Names and layouts of weights: the original's PyTorch state dicts to flax variables and back.

`NAMES` is the only place that knows both sides. A PyTorch linear stores `[out, in]`, a
convolution `[out, in / groups, k, k]`; flax stores `[in, out]` and `[k, k, in / groups, out]`. The
ATM's two sampled linears are 1x1 convolutions in the original and linears here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from activemlp_jax.models.backbone import ActiveMLP

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

Path = tuple[str, ...]


def torch_name(path: Path, depths: Iterable[int]) -> str:
    """The original's key of the parameter at the flax `path` in a model with these `depths`."""
    *module, parameter = path
    for flax_pattern, torch_template in NAMES:
        match = re.fullmatch(flax_pattern, "/".join(module))
        if match:
            name = match.expand(torch_template)
            if "LAST" in name:
                last = tuple(depths)[int(match[1])] - 1
                name = name.replace("LAST", str(last))
            return f"{name}.{'bias' if parameter == 'bias' else 'weight'}"
    raise ValueError(f"no PyTorch name for the parameter {'/'.join(path)}")


def _is_pointwise_convolution(path: Path) -> bool:
    return path[-1] == "kernel" and path[-2] in ("atm_w", "atm_h")


def _to_torch_layout(path: Path, value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    return value[:, :, None, None] if _is_pointwise_convolution(path) else value


def _to_flax_layout(path: Path, value: np.ndarray) -> np.ndarray:
    if _is_pointwise_convolution(path):
        value = value[:, :, 0, 0]
    if path[-1] == "kernel":
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
    return value


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(path, np.broadcast_to(np.zeros(()), shape)).shape


def as_numpy(value: Any) -> np.ndarray:
    """A numpy view of an array or a PyTorch tensor."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has none of its own
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def _list_keys(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(keys[:most])
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown


def _rows(state_dict: Mapping[str, Any], key: str) -> int:
    """The first size of a weight; none has a size of zero."""
    if key not in state_dict:
        found = f"found {_list_keys(list(state_dict), 3)}" if state_dict else "it is empty"
        raise ValueError(
            f"the state dict misses {key}, which every ActiveMLP classifier has; {found}"
        )
    shape = tuple(state_dict[key].shape)
    if not shape or 0 in shape:
        raise ValueError(f"{key} has shape {shape}, which no ActiveMLP has")
    return shape[0]


def _depths(blocks: set[tuple[int, int]]) -> tuple[int, ...]:
    """Blocks a stage, from the (stage, block) numbers that occur."""
    return tuple(1 + max((j for i, j in blocks if i == stage), default=-1) for stage in range(4))


def _ratio(hidden: int, dim: int) -> float:
    """The ratio for which `int(dim * ratio) == hidden`; an integer where it is one."""
    if hidden % dim == 0:
        return hidden // dim
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def infer_architecture(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the ActiveMLP whose weights these are, read off keys and shapes.

    Args:
      state_dict: PyTorch names to arrays or tensors; only shapes are looked at.

    Returns:
      Keyword arguments of `ActiveMLP`: the five of the architecture, and `num_classes`. Where
      several `offset_interval`s give the same network, the smallest.

    Raises:
      ValueError: a key that every model has is missing or has a shape that none has, named.
    """
    matches = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in state_dict)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    depths = _depths(blocks)
    for stage, depth in enumerate(depths):
        count = sum(i == stage for i, _ in blocks)
        if count != depth:
            raise ValueError(f"stage {stage} has a block {depth - 1}, but only {count} blocks")
    embed_dims, mlp_ratios, share_dims = [], [], []
    for stage in range(4):
        dim = _rows(state_dict, f"blocks.{stage}.0.norm1.weight")
        hidden = _rows(state_dict, f"blocks.{stage}.0.mlp.fc1.weight")
        offsets = _rows(state_dict, f"blocks.{stage}.0.offset_layer.1.weight")
        embed_dims.append(dim)
        mlp_ratios.append(_ratio(hidden, dim))
        share_dims.append(2 * dim // offsets)

    matches = (re.match(r"blocks\.(\d+)\.(\d+)\.offset_layer\.", key) for key in state_dict)
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
        "num_classes": _rows(state_dict, "head.weight"),
    }


def parameter_shapes(model: ActiveMLP) -> dict[Path, tuple[int, ...]]:
    """Shapes of all parameters of `model` by flax path, without computing any."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables["params"]).items()}


def from_torch(state_dict: Mapping[str, Any], model: ActiveMLP | None = None) -> dict[str, Any]:
    """Flax variables from the original's PyTorch weights; nothing is left out or made up.

    Args:
      state_dict: PyTorch names to arrays or tensors, of a classifier.
      model: what the weights are for; without it, the model is inferred from the shapes.

    Returns:
      `{'params': tree}` of numpy arrays in flax layout and the dtypes given.

    Raises:
      ValueError: keys are missing, unknown or of another shape than the model's, listed.

    Source: the keys of the authors' released checkpoints.
    """
    model = ActiveMLP(**infer_architecture(state_dict)) if model is None else model
    shapes = parameter_shapes(model)
    names = {path: torch_name(path, model.depths) for path in shapes}
    missing = [name for name in names.values() if name not in state_dict]
    unknown = sorted(set(state_dict) - set(names.values()))
    if missing or unknown:
        detail = [f"{len(missing)} missing ({_list_keys(missing)})"] if missing else []
        detail += [f"{len(unknown)} unknown ({_list_keys(unknown)})"] if unknown else []
        raise ValueError(
            f"the state dict does not fit the model with depths {tuple(model.depths)} and "
            f"embed_dims {tuple(model.embed_dims)}: keys {', '.join(detail)}"
        )
    flat = {}
    for path, name in names.items():
        value = as_numpy(state_dict[name])
        expected = _torch_shape(path, shapes[path])
        if value.shape != expected:
            raise ValueError(f"{name} has shape {value.shape}, the model expects {expected}")
        flat[path] = _to_flax_layout(path, value)
    return {"params": traverse_util.unflatten_dict(flat)}


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original's PyTorch weights from flax variables: the exact inverse of `from_torch`.

    Args:
      variables: `{'params': tree}` of a classifier.

    Returns:
      PyTorch names to contiguous arrays in PyTorch layout and the dtypes given.

    Raises:
      ValueError: a parameter that no ActiveMLP classifier has, named.
    """
    flat = traverse_util.flatten_dict(variables["params"])
    matches = (re.match(r"stages_(\d+)/block_(\d+)/", "/".join(path)) for path in flat)
    depths = _depths({(int(match[1]), int(match[2])) for match in matches if match})
    return {
        torch_name(path, depths): np.ascontiguousarray(_to_torch_layout(path, np.asarray(value)))
        for path, value in flat.items()
    }

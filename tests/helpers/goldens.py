"""Reference numbers ("goldens") of the original, and the weights and inputs they were made with.

The `.npz` files in `tests/fixtures` come from the authors' PyTorch release, run in float64. They
hold neither weights nor inputs: names, seeds and numpy's generator determine both.
"""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax import from_torch, to_torch

DATA = Path(__file__).parents[1] / "fixtures"

MICRO: dict[str, Any] = {
    "depths": (2, 3, 4, 2),
    "embed_dims": (8, 16, 24, 32),
    "mlp_ratios": (4, 4, 2, 2),
    "share_dims": (2, 4, 4, 8),
    "offset_interval": 2,
    "num_classes": 10,
}

SEG_MICRO: dict[str, dict[str, Any]] = {
    head: {
        "backbone": {name: value for name, value in MICRO.items() if name != "num_classes"},
        "head": head,
        "num_classes": 7,
        **widths,
    }
    for head, widths in {
        "upernet": {"channels": 16, "aux_channels": 8},
        "fpn": {"channels": 8, "neck_channels": 16},
    }.items()
}

ORIGINAL_NAMES = {
    "active_xtiny": "ActivexTiny",
    "active_tiny": "ActiveTiny",
    "active_small": "ActiveSmall",
    "active_base": "ActiveBase",
    "active_large": "ActiveLarge",
}


def load(name: str) -> dict[str, np.ndarray]:
    """Load all arrays of a `.npz` file of goldens."""
    with np.load(DATA / name) as arrays:
        return dict(arrays)


def load_json(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def normal(seed: int, tag: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(tag.encode())]).standard_normal(shape)


def golden_input(file: str, key: str) -> np.ndarray:
    """Generate the input `key` of a golden file, and check its sum."""
    spec = load_json("inputs.json")[file][key]
    values = normal(spec["seed"], spec["tag"], spec["shape"])
    np.testing.assert_allclose(values.sum(), spec["sum"], rtol=1e-9)
    return values


def rule_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return the value of the PyTorch parameter or statistic `name` in the golden runs."""
    if name.endswith("num_batches_tracked"):
        return np.asarray(1)
    noise = normal(seed, name, shape)
    if name.endswith("running_var"):
        return 1 + 0.2 * np.abs(noise)
    if name.endswith("running_mean"):
        return 0.1 * noise
    if name.endswith("offset_layer.1.bias"):
        return 1.5 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    if noise.ndim == 1:
        return 1 + 0.1 * noise
    weight = noise / np.sqrt(np.prod(shape[1:]))
    return 2 * weight if name.endswith("offset_layer.1.weight") else weight


def rule_state_dict(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    return {name: rule_weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def official_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of the released checkpoint of a variant, such as 'active_tiny'."""
    shapes = load_json("official_keys.json")[ORIGINAL_NAMES[name]]
    return {key: tuple(shape) for key, shape in shapes.items()}


@functools.cache
def torch_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the PyTorch keys and shapes of a flax model."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros(()), leaf.shape), variables)
    return {key: value.shape for key, value in to_torch(zeros).items()}


def rule_variables(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Return the flax variables of `model` in the golden runs, in the dtype of its parameters."""
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    variables = from_torch(rule_state_dict(torch_shapes(model), seed), model)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype if leaf.dtype.kind == "f" else leaf.dtype), variables
    )


def relative_error(ours: Any, golden: np.ndarray) -> float:
    """Return the norm of the difference of two arrays, divided by the norm of the golden."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == golden.shape, f"shape {ours.shape}, golden {golden.shape}"
    return float(np.linalg.norm(ours - golden) / np.linalg.norm(golden))


def assert_close(ours: Any, golden: np.ndarray, bound: float, what: str) -> None:
    error = relative_error(ours, golden)
    assert error <= bound, f"{what}: relative error {error:.2e}, allowed {bound:.0e}"

"""Gradients of a bfloat16 model: sums over positions and images are in float32."""

import math
import re
from collections import Counter
from functools import partial
from typing import Any

import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import activemlp_jax as am
from activemlp_jax.models.layers import Conv, Dense, depthwise
from activemlp_jax.models.mixer import ActiveTokenMixer
from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP

BATCH = 128
LONGEST_SUM = 1024  # the most elements that may be summed in bfloat16


def representable(values: np.ndarray) -> np.ndarray:
    """Round `values` to bfloat16, and return them as float64."""
    return values.astype(jnp.bfloat16).astype(np.float64)


def parameters_of(module: nn.Module, *shapes: tuple[int, ...]) -> Any:
    """Make random parameters, including biases, that bfloat16 represents exactly."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def make(path: Any, leaf: Any) -> np.ndarray:
        values = goldens.normal(0, jax.tree_util.keystr(path), leaf.shape)
        return representable(values / math.sqrt(math.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(make, variables)


def cotangents(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Make output cotangents of standard deviation 1, keyed by a description."""
    noise = goldens.normal(0, "cotangent", shape)
    return {f"mean {mean}": representable(noise + mean) for mean in (0, 0.1)}


def gradients(
    module: Any, dtype: str, variables: Any, inputs: list[np.ndarray], given: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Compute the gradients of all parameters in `dtype` for each output cotangent in `given`."""
    with jax.enable_x64(dtype == "float64"):
        kept = jnp.promote_types(dtype, jnp.float32)
        # The first input is a map; a second input would be offsets.
        cast = [jnp.asarray(x, kept if i else dtype) for i, x in enumerate(inputs)]

        @jax.jit
        def transpose(variables: Any, inputs: list[jax.Array], cotangent: jax.Array) -> Any:
            apply = module.clone(dtype=jnp.dtype(dtype), param_dtype=kept).apply
            out, transposed = jax.vjp(lambda variables: apply(variables, *inputs), variables)
            return transposed(cotangent.astype(out.dtype))[0]

        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, kept), variables)
        return {
            name: jax.tree.map(np.asarray, transpose(variables, cast, jnp.asarray(value)))
            for name, value in given.items()
        }


def errors(ours: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """Compute the relative error of each parameter's gradient, keyed by its path."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(exact)]
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
    return {
        path: goldens.relative_error(found, expected)
        for path, (found, expected) in zip(paths, pairs, strict=True)
    }


@pytest.mark.parametrize(
    ("layer", "inputs", "output"),
    [
        (Dense(8, dtype=jnp.bfloat16), [(BATCH, 56, 56, 16)], (BATCH, 56, 56, 8)),
        (Conv(8, (3, 3), 2, 1, dtype=jnp.bfloat16), [(BATCH, 111, 111, 4)], (BATCH, 56, 56, 8)),
        (depthwise(8, jnp.bfloat16, jnp.float32), [(BATCH, 56, 56, 8)], (BATCH, 56, 56, 8)),
        (  # all tokens are mapped at once
            ActiveTokenMixer(jnp.bfloat16),
            [(BATCH, 56, 56, 8), (BATCH, 56, 56, 4)],
            (BATCH, 56, 56, 8),
        ),
        (  # each token is mapped by itself
            ActiveTokenMixer(jnp.bfloat16),
            [(BATCH, 7, 7, 32), (BATCH, 7, 7, 8)],
            (BATCH, 7, 7, 32),
        ),
    ],
    ids=["dense", "convolution", "depthwise", "mixer of large maps", "mixer of small maps"],
)
def test_gradients_of_a_layer_are_the_exact_sums(
    layer: Any, inputs: list[tuple[int, ...]], output: tuple[int, ...]
):
    variables = parameters_of(layer, *inputs)
    arrays = [representable(3 * goldens.normal(i, "x", shape)) for i, shape in enumerate(inputs)]
    given = cotangents(output)
    exact = gradients(layer, "float64", variables, arrays, given)
    ours = gradients(layer, "bfloat16", variables, arrays, given)
    too_far = {
        f"{path}, {name}": f"{error:.2%}"
        for name in given
        for path, error in errors(ours[name], exact[name]).items()
        if error > 0.005
    }
    assert not too_far


def test_gradients_of_a_model_are_those_of_float64():
    fields: dict[str, Any] = {
        "depths": (2, 2, 2, 2),
        "embed_dims": (8, 8, 16, 16),
        "mlp_ratios": (2, 2, 2, 2),
        "share_dims": (2, 2, 4, 4),
        "offset_interval": 1,
        "num_classes": 10,
    }
    reference = TorchActiveMLP(**fields).double()
    shapes = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    weights = {}
    for name, value in goldens.rule_state_dict(shapes).items():
        # Keep positions far from integers: one rounded past an integer reads other features.
        if name.endswith("offset_layer.1.weight"):
            value = value / 1000
        if name.endswith("offset_layer.1.bias"):
            value = np.floor(value) + 0.5
        weights[name] = representable(value)
    reference.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    images = representable(goldens.normal(0, "images", (BATCH, 64, 64, 3)))
    cotangent = np.tile(representable(goldens.normal(0, "logits", (1, 10))), (BATCH, 1))
    reference(torch.tensor(images)).backward(torch.tensor(cotangent))
    exact = {name: value.grad for name, value in reference.named_parameters()}

    model = am.ActiveMLP(**fields, dtype=jnp.bfloat16)
    variables = am.from_torch(weights, model)
    ours = gradients(model, "bfloat16", variables, [images], {"logits": cotangent})["logits"]
    found = {
        name: goldens.relative_error(value, np.asarray(exact[name]))
        for name, value in am.to_torch(ours).items()
    }
    assert len(found) == len(exact)
    assert not {name: f"{error:.2%}" for name, error in found.items() if error > 0.04}


def longest_sums(program: str) -> Counter[str]:
    """Count the elements of the longest sum in each dtype in `program`, a StableHLO text."""
    tensor = r"tensor<((?:\d+x)*)(\w+)>"
    reduction = re.compile(
        rf"stablehlo\.reduce\(.*applies stablehlo\.(\w+) across .*: \({tensor}, .* -> {tensor}"
    )
    found = reduction.findall(program)
    assert len(found) == program.count("stablehlo.reduce"), "some are written in another form"
    longest: Counter[str] = Counter()
    for operation, operand, dtype, result, _ in found:
        if operation == "add":
            before, after = (math.prod(map(int, x.split("x")[:-1])) for x in (operand, result))
            longest[dtype] = max(longest[dtype], before // after)
    return longest


def test_a_sum_over_positions_in_bfloat16_is_found():
    def biased(bias: jax.Array, x: jax.Array) -> jax.Array:
        return (x + bias.astype(x.dtype).reshape(1, 1, 1, -1)).astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((6,), jnp.float32), jnp.zeros((2, 5, 7, 6), jnp.bfloat16)]
    program = jax.jit(jax.value_and_grad(biased)).lower(*arrays).as_text()
    assert longest_sums(program) == {"bf16": 2 * 5 * 7, "f32": 2 * 5 * 7 * 6}


def backbone() -> tuple[nn.Module, int, dict[str, Any]]:
    return am.create_model("active_xtiny", dtype=jnp.bfloat16), 224, {}


def segmentor(head: str) -> tuple[nn.Module, int, dict[str, Any]]:
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head], dtype=jnp.bfloat16)
    mode = {"train": True, "mutable": ["batch_stats"], "return_aux": head == "upernet"}
    return model, 64, mode | {"rngs": {"dropout": jax.random.key(0)}}


@pytest.mark.parametrize(
    "make",
    [backbone, partial(segmentor, "upernet"), partial(segmentor, "fpn")],
    ids=["active_xtiny", "upernet", "fpn"],
)
def test_the_gradient_has_no_long_sum_in_bfloat16(make: Any):
    model, side, mode = make()
    images = jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        out = model.apply({"params": params, **rest}, images, **mode)
        logits = out[0] if mode else out
        return jnp.stack([jnp.square(x).mean() for x in jax.tree.leaves(logits)]).sum()

    program = jax.jit(jax.grad(loss)).lower(variables["params"], rest, images).as_text()
    sums = longest_sums(program)
    assert sums["f32"] >= BATCH * (side // 4) ** 2, sums  # the gradient of the stem's bias
    assert sums["bf16"] <= LONGEST_SUM, sums

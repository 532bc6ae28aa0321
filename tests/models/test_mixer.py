"""The Active Token Mixer's layer on large and small maps, compared with its formula."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from goldens import assert_close, normal

from activemlp_jax.models.mixer import ActiveTokenMixer, OffsetLayer
from activemlp_jax.ops.sample_axis import sample_axis

CHANNELS, GROUPS = 8, 4
# With more than three times as many positions as channels, all tokens are mapped at once.
SIDES = [(4, 6), (5, 5), (1, 3), (12, 10)]


def layer(parameters: Any, x: jax.Array) -> jax.Array:
    out = x @ parameters["kernel"]
    return out + parameters["bias"].reshape(1, 1, 1, -1) if "bias" in parameters else out


def formula(variables: Any, x: jax.Array, offset: jax.Array) -> jax.Array:
    """Map each token by itself, compute mixing weights from the mean of the results, and mix."""
    params = variables["params"]
    offset_w, offset_h = jnp.split(offset, 2, axis=-1)
    w = layer(params["atm_w"], sample_axis(x, offset_w, "w", impl="definition"))
    h = layer(params["atm_h"], sample_axis(x, offset_h, "h", impl="definition"))
    c = layer(params["atm_c"], x)
    hidden = layer(params["fusion"]["fc1"], (w + h + c).mean(axis=(1, 2), keepdims=True))
    logits = layer(params["fusion"]["fc2"], jax.nn.gelu(hidden, approximate=False))
    weight = jax.nn.softmax(logits.reshape(*logits.shape[:-1], CHANNELS, 3), axis=-1)
    return layer(params["proj"], w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2])


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_values_and_gradients_are_the_formulas(sides: tuple[int, int], dtype: str, bound: float):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(normal(1, "x", (2, *sides, CHANNELS)), dtype)
        offset = jnp.asarray(2 * normal(1, "offset", (2, *sides, 2 * GROUPS)), dtype)
        cotangent = jnp.asarray(normal(1, "cotangent", x.shape), dtype)
        mixer = ActiveTokenMixer(jnp.dtype(dtype), jnp.dtype(dtype))
        variables = jax.eval_shape(mixer.init, jax.random.key(0), x, offset)
        # Replace the biases too: they start at zero, where a mistake would not show.
        variables = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(
                normal(1, jax.tree_util.keystr(path), leaf.shape), dtype
            ),
            variables,
        )
        arguments = (variables, x, offset)

        @partial(jax.jit, static_argnums=0)
        def value_and_cotangents(function: Any, *arguments: Any) -> Any:
            value, transposed = jax.vjp(function, *arguments)
            return value, transposed(cotangent)

        ours = value_and_cotangents(mixer.apply, *arguments)
        expected = value_and_cotangents(formula, *arguments)
        for (path, theirs), found in zip(
            jax.tree.leaves_with_path(expected), jax.tree.leaves(ours), strict=True
        ):
            assert_close(found, theirs, bound, jax.tree_util.keystr(path))


@pytest.mark.parametrize(("sides", "products"), [((5, 5), 1), ((4, 6), 4)], ids=str)
def test_large_maps_are_multiplied_once_and_small_ones_four_times(
    sides: tuple[int, int], products: int
):
    mixer = ActiveTokenMixer()
    shapes = [(1, *sides, channels) for channels in (CHANNELS, 2 * GROUPS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    variables = jax.eval_shape(mixer.init, jax.random.key(0), *arrays)
    text = jax.jit(mixer.apply).lower(variables, *arrays).as_text()
    made = f"-> tensor<1x{sides[0]}x{sides[1]}x{CHANNELS}xf32>"
    assert sum("dot_general" in line and made in line for line in text.splitlines()) == products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_for_offsets_are_of_the_highest_precision_forward_and_backward(dtype: str):
    layer, x = OffsetLayer(2), jax.ShapeDtypeStruct((1, 5, 5, 8), dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        return jnp.square(layer.apply(variables, x)).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables, x).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for product in products:
        assert "precision = [HIGHEST, HIGHEST]" in product
        assert "bf16" not in product

"""Depthwise convolution as multiply-adds, compared with XLA's grouped convolution."""

import goldens
import jax
import jax.numpy as jnp
import pytest

from activemlp_jax.ops.depthwise import depthwise_conv


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sides", [(1, 1), (4, 5), (9, 2)], ids=str)
def test_values_and_gradients_are_those_of_a_grouped_convolution(sides: tuple[int, int]):
    x = jnp.asarray(goldens.normal(0, "x", (2, *sides, 6)))
    kernel = jnp.asarray(goldens.normal(0, "kernel", (3, 3, 1, 6)))
    arguments = {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": 6,
    }
    results = []
    for convolve in (depthwise_conv, jax.lax.conv_general_dilated):
        out, transpose = jax.vjp(lambda *a, f=convolve: f(*a, **arguments), x, kernel)
        results.append([out, *transpose(jnp.cos(out))])
    for name, ours, expected in zip(("value", "grad_x", "grad_kernel"), *results, strict=True):
        goldens.assert_close(ours, expected, 1e-12, name)


def test_bfloat16_is_summed_in_float32():
    out = depthwise_conv(
        jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2)), (1, 1), [(1, 1)] * 2
    )
    assert out.dtype == jnp.float32

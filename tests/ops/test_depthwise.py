"""Depthwise convolution by multiply-adds, compared with XLA's grouped convolution."""

from functools import partial

import goldens
import jax
import jax.numpy as jnp
import pytest

from activemlp_jax.ops.depthwise import conv_by_shifts, plain_conv_by_shifts

FORMS = [conv_by_shifts, plain_conv_by_shifts]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS, ids=["rule", "plain"])
@pytest.mark.parametrize("sides", [(1, 1), (4, 5), (9, 2)], ids=str)
def test_values_and_gradients_are_those_of_a_grouped_convolution(sides: tuple[int, int], form):
    x = jnp.asarray(goldens.normal(0, "x", (2, *sides, 6)))
    kernel = jnp.asarray(goldens.normal(0, "kernel", (3, 3, 1, 6)))
    grouped = partial(
        jax.lax.conv_general_dilated,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    results = []
    for convolve in (form, grouped):
        apply = partial(convolve, padding=((1, 1), (1, 1)))
        out, transpose = jax.vjp(lambda x, k, f=apply: f(x, k, (1, 1)), x, kernel)
        results.append([out, *transpose(jnp.cos(out))])
    for name, ours, expected in zip(("value", "grad_x", "grad_kernel"), *results, strict=True):
        goldens.assert_close(ours, expected, 1e-12, name)


def test_bfloat16_is_summed_in_float32():
    x, kernel = jnp.ones((1, 3, 3, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    assert conv_by_shifts(x, kernel, (1, 1), [(1, 1), (1, 1)]).dtype == jnp.float32


def test_the_padded_map_is_not_kept_for_the_backward_pass():
    x, kernel = jnp.ones((2, 4, 5, 3)), jnp.ones((3, 3, 1, 3))
    convolve = partial(conv_by_shifts, strides=(1, 1), padding=((1, 1), (1, 1)))
    out, transpose = jax.vjp(convolve, x, kernel)
    waiting = [
        {variable.aval.shape for variable in eqn.outvars}
        for eqn in jax.make_jaxpr(transpose)(out).eqns
        if eqn.primitive.name == "optimization_barrier"
    ]
    assert {x.shape} in waiting, waiting

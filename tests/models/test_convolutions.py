"""Convolutions by other means, held against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import assert_close, normal

from activemlp_jax.models import convolutions

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("sides", [(32, 32), (37, 50), (38, 51)])
@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_products_of_patches_are_the_convolution_and_its_derivative(size, stride, padding, sides):
    x = jnp.asarray(normal(0, "input", (2, *sides, 3)))
    kernel = jnp.asarray(normal(0, "kernel", (size, size, 3, 8)))

    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=convolutions.NHWC
        )

    out, transposed = jax.vjp(convolve, kernel)
    found = convolutions.convolve_by_patches(x, kernel, stride, padding)
    assert_close(found, np.asarray(out), 1e-12, "the convolution")
    cotangent = jnp.asarray(normal(0, "cotangent", out.shape))
    for form in (convolutions.cotangent_by_slices, convolutions.cotangent_by_filters):
        found = form(x, kernel, cotangent, stride, padding)
        assert_close(found, np.asarray(transposed(cotangent)[0]), 1e-12, form.__name__)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (convolutions.DepthwiseConv(jnp.float64), (2, 4, 5, 3)),
        (convolutions.Conv(4, 7, 4, 2, jnp.float64), (1, 9, 10, 3)),
    ],
    ids=["depthwise", "of an image"],
)
def test_what_a_derivative_makes_of_the_input_waits_for_the_cotangent(layer, shape):
    x = jnp.asarray(normal(0, "input", shape))
    variables = layer.init(jax.random.key(0), x)
    out, transposed = jax.vjp(lambda variables: layer.apply(variables, x), variables)
    backward = jax.make_jaxpr(transposed)(out)
    waiting = [
        {variable.aval.shape for variable in eqn.outvars}
        for eqn in backward.eqns
        if eqn.primitive.name == "optimization_barrier"
    ]
    assert {shape, out.shape} in waiting, backward

"""GELU's custom VJP, compared with JAX's derivative of the plain function and with scipy."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from activemlp_jax.ops.gelu import gelu, plain_gelu


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("function", [gelu, plain_gelu])
def test_values_and_derivatives_are_exact(function):
    x = 3 * goldens.normal(0, "x", (2, 3, 5))
    out, transpose = jax.vjp(function, jnp.asarray(x))
    goldens.assert_close(out, x * norm.cdf(x), 1e-14, "value")
    expected = norm.cdf(x) + x * norm.pdf(x)
    goldens.assert_close(transpose(jnp.ones_like(out))[0], expected, 1e-14, "derivative")


def test_bfloat16_is_computed_in_float32():
    x = jnp.linspace(-4, 4, 101).astype(jnp.bfloat16)
    exact = np.asarray(plain_gelu(x.astype(jnp.float32)))
    np.testing.assert_array_equal(gelu(x), exact.astype(jnp.bfloat16))

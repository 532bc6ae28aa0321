"""Layers whose derivatives are written by hand, held against what JAX derives and differences."""

import jax
import jax.numpy as jnp
import pytest
from goldens import normal
from jax.test_util import check_grads

from activemlp_jax.models import convolutions, layers

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Linear(5, True, jnp.float64), (2, 3, 4)),
        (layers.Linear(3, True, jnp.float64), (2, 3, 4)),  # fewer out than in
        (layers.LayerNorm(jnp.float64), (2, 3, 6)),
        (convolutions.DepthwiseConv(jnp.float64), (2, 4, 5, 3)),
        (convolutions.Conv(4, 7, 4, 2, jnp.float64), (1, 9, 10, 3)),  # of an image
        (convolutions.Conv(4, 3, 2, 1, jnp.float64), (1, 5, 4, 16)),
        (layers.Mlp(6, 4, jnp.float64), (2, 3, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, layers.nn.Module) else "",
)
def test_derivatives_by_input_and_parameters_are_those_of_differences(layer, shape):
    x = jnp.asarray(normal(0, "input", shape))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(normal(0, "weights", leaf.shape)), layer.init(jax.random.key(0), x)
    )
    check_grads(layer.apply, (variables, x), order=1, modes=["rev"])

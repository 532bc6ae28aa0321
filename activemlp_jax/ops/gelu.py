"""Exact GELU with a custom VJP that keeps only its input for the backward pass.

Without the custom VJP, the gradient of active_xtiny in bfloat16 accesses 7% more memory on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np


def plain_gelu(x: jax.Array) -> jax.Array:
    """Compute exact GELU in float32 or wider: `x * normal_cdf(x)`, returned in the dtype of `x`."""
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (exact * _normal_cdf(exact)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5)))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Compute `plain_gelu`, with a custom VJP."""
    return plain_gelu(x)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # On TPUs, XLA would evaluate erf inside the matmuls that read this, in both passes: a few
    # percent more memory traffic, and an eighth more compile time.
    result = jax.lax.platform_dependent(
        plain_gelu(x), tpu=jax.lax.optimization_barrier, default=lambda y: y
    )
    return result, x


def _backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Evaluating erf again is faster than storing and loading it. XLA would store it if the barrier
    # did not hide that this is the x of the forward pass.
    x, grad = jax.lax.optimization_barrier((x, grad))
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * jnp.square(exact)) * (1 / np.sqrt(2 * np.pi))
    return ((grad * (_normal_cdf(exact) + exact * density)).astype(x.dtype),)


gelu.defvjp(_forward, _backward)

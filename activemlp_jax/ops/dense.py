"""Dense implementation: outputs are weighted sums over whole rows or columns, without indices.

`out[i] = sum_k weight(i, k) * x[k]`, where only the two pixels k next to the sampled position have
nonzero weights. The terms of the sum take many times the memory of the map, so this needs a
compiler that fuses them into the sum. It has no scatter, so every run adds in the same order.
"""

import jax
import jax.numpy as jnp

from activemlp_jax.ops.reference import split_offset


def _repeat(offset: jax.Array, channels: int) -> jax.Array:
    """Repeat offsets `[.., G]` for the channels of each group, to `[.., C]`."""
    *leading, groups = offset.shape
    repeated = jnp.broadcast_to(offset[..., None], (*leading, groups, channels // groups))
    return repeated.reshape(*leading, channels)


def _neighbors(offset: jax.Array, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return masks of the pixels left and right, on a new axis after `dim`, and fractions."""
    floor, fraction = (jnp.expand_dims(a, dim + 1) for a in split_offset(offset, dim))
    shape = (*offset.shape[: dim + 1], offset.shape[dim], *offset.shape[dim + 1 :])
    pixel = jax.lax.broadcasted_iota(offset.dtype, shape, dim + 1)
    return pixel == floor, pixel == floor + 1, fraction


def _dim(axis: str) -> int:
    return {"h": 1, "w": 2}[axis]


def forward(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """Sample `x` at the shifted positions."""
    dim, repeated = _dim(axis), _repeat(offset, x.shape[-1])
    left, right, fraction = _neighbors(repeated, dim)
    weight = jnp.where(left, 1 - fraction, jnp.where(right, fraction, 0))
    total = (weight * jnp.expand_dims(x, dim)).sum(dim + 1)
    # A NaN or infinite offset matches no pixel, so its sum is zero, not NaN.
    return jnp.where(jnp.isfinite(repeated), total, jnp.nan).astype(x.dtype)


def grad_x(x: jax.Array, offset: jax.Array, grad: jax.Array, axis: str) -> jax.Array:
    """Compute the gradient of `x`, `[B, H, W, C]`, which does not depend on the values of `x`."""
    dim = _dim(axis)
    left, right, fraction = _neighbors(_repeat(offset, x.shape[-1]), dim)
    weight = jnp.where(left, 1 - fraction, jnp.where(right, fraction, 0))
    return (weight * jnp.expand_dims(grad, dim + 1)).sum(dim).astype(x.dtype)


def backward(
    x: jax.Array, offset: jax.Array, grad: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of `x` and `offset`."""
    dim = _dim(axis)
    left, right, _ = _neighbors(_repeat(offset, x.shape[-1]), dim)
    values = jnp.expand_dims(x.astype(offset.dtype), dim)
    slope = grad * jnp.where(right, values, jnp.where(left, -values, 0)).sum(dim + 1)
    grad_offset = slope.astype(offset.dtype).reshape(*offset.shape, -1).sum(-1)
    return grad_x(x, offset, grad, axis), grad_offset

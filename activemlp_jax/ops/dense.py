"""Weighs every place of a line for every position, without indices.

`out[i] = sum_k weight(i, k) * x[k]`, where the weights are zero but at the two places around
position i. The sum's terms are many times the map, so this needs a compiler that never writes
them down. Nothing is scattered, so that sums have one order, the same in every run.
"""

import jax
import jax.numpy as jnp

from activemlp_jax.ops.reference import split_offset


def _repeat(offset: jax.Array, channels: int) -> jax.Array:
    """Offsets [.., G] for each channel [.., C]."""
    *leading, groups = offset.shape
    repeated = jnp.broadcast_to(offset[..., None], (*leading, groups, channels // groups))
    return repeated.reshape(*leading, channels)


def _places(offset: jax.Array, dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where place k, on a new axis behind `dim`, is left and right of the position; fractions."""
    floor, fraction = (jnp.expand_dims(a, dim + 1) for a in split_offset(offset, dim))
    shape = (*offset.shape[: dim + 1], offset.shape[dim], *offset.shape[dim + 1 :])
    place = jax.lax.broadcasted_iota(offset.dtype, shape, dim + 1)
    return place == floor, place == floor + 1, fraction


def _dim(axis: str) -> int:
    return {"h": 1, "w": 2}[axis]


def forward(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """The operator."""
    dim, repeated = _dim(axis), _repeat(offset, x.shape[-1])
    left, right, fraction = _places(repeated, dim)
    weight = jnp.where(left, 1 - fraction, jnp.where(right, fraction, 0))
    total = (weight * jnp.expand_dims(x, dim)).sum(dim + 1)
    # No place is equal to one that is not finite.
    return jnp.where(jnp.isfinite(repeated), total, jnp.nan).astype(x.dtype)


def x_cotangent(x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str) -> jax.Array:
    """`[B, H, W, C]`; of `x` only dtype and shape matter."""
    dim = _dim(axis)
    left, right, fraction = _places(_repeat(offset, x.shape[-1]), dim)
    weight = jnp.where(left, 1 - fraction, jnp.where(right, fraction, 0))
    return (weight * jnp.expand_dims(cotangent, dim + 1)).sum(dim).astype(x.dtype)


def backward(
    x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of `x` and `offset`."""
    dim = _dim(axis)
    left, right, _ = _places(_repeat(offset, x.shape[-1]), dim)
    values = jnp.expand_dims(x.astype(offset.dtype), dim)
    slope = cotangent * jnp.where(right, values, jnp.where(left, -values, 0)).sum(dim + 1)
    slope = slope.astype(offset.dtype).reshape(*offset.shape, -1).sum(-1)
    return x_cotangent(x, offset, cotangent, axis), slope

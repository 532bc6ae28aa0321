"""Forwards reads rows of channels that share an offset, backwards adds them where they were read.

For CPUs, whose memory likes it. A map is padded to the places that lie just outside it, and then
is one table of rows, so that no index needs a test.
"""

from functools import partial

import jax
import jax.numpy as jnp

from activemlp_jax.ops.reference import first_index, split_offset

BEFORE, AFTER = 2, 1  # places outside the map that `first_index` and the next one may name


def _padding(axis: int, rank: int) -> list[tuple[int, int]]:
    return [(BEFORE, AFTER) if dimension == axis else (0, 0) for dimension in range(rank)]


def _places(offset: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Of one map's offsets [H, W, G]: rows of the padded table [H, W, G, 2], and fractions."""
    _, width, groups = offset.shape
    floor, fraction = split_offset(offset, axis)
    place = first_index(floor, offset.shape[axis]) + BEFORE
    h, w, g = (jax.lax.broadcasted_iota(jnp.int32, offset.shape, d) for d in range(3))
    if axis == 0:
        row, step = (place * width + w) * groups + g, width * groups
    else:
        row, step = (h * (width + BEFORE + AFTER) + place) * groups + g, groups
    return jnp.stack([row, row + step], axis=-1), fraction[..., None]


def _read(x: jax.Array, rows: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """One map's values [H, W, G, S] at the two places around each position."""
    table = jnp.pad(x, _padding(axis, 3)).reshape(-1, x.shape[-1] // rows.shape[2])
    read = table.at[rows[..., 0]].get, table.at[rows[..., 1]].get
    left, right = (get(mode="promise_in_bounds") for get in read)
    return left, right


def _forward_map(x: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    rows, fraction = _places(offset, axis)
    left, right = _read(x, rows, axis)
    return ((1 - fraction) * left + fraction * right).astype(x.dtype).reshape(x.shape)


def _offset_cotangent_map(
    x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: int
) -> jax.Array:
    rows, _ = _places(offset, axis)
    left, right = (value.astype(offset.dtype) for value in _read(x, rows, axis))
    slope = cotangent.reshape(left.shape) * (right - left)
    # The barrier keeps the reads out of the sum, and the sum is written out, as a reduction over
    # few neighbours is slow on CPUs: together a third of the time.
    slope = jax.lax.optimization_barrier(slope)
    return sum((slope[..., s] for s in range(1, slope.shape[-1])), start=slope[..., 0])


def _x_cotangent_map(x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: int) -> jax.Array:
    rows, fraction = _places(offset, axis)
    share = x.shape[-1] // offset.shape[-1]
    given = cotangent.reshape(*offset.shape, 1, share).astype(offset.dtype)
    padded = [sum(pair) + side for pair, side in zip(_padding(axis, 3), x.shape, strict=True)]
    table = jnp.zeros(padded, offset.dtype).reshape(-1, share)
    parts = jnp.stack([1 - fraction, fraction], axis=-2) * given
    table = table.at[rows].add(parts, mode="promise_in_bounds").reshape(padded)
    return jax.lax.slice_in_dim(table, BEFORE, BEFORE + x.shape[axis], axis=axis).astype(x.dtype)


def _map_axis(axis: str) -> int:
    return {"h": 0, "w": 1}[axis]


@partial(jax.jit, static_argnums=2)
def forward(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """The operator."""
    return jax.vmap(partial(_forward_map, axis=_map_axis(axis)))(x, offset)


def offset_cotangent(x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str) -> jax.Array:
    """`[B, H, W, G]`, by reading alone."""
    per_map = partial(_offset_cotangent_map, axis=_map_axis(axis))
    return jax.vmap(per_map)(x, offset, cotangent)


def backward(
    x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of `x` and `offset`."""
    per_map = partial(_x_cotangent_map, axis=_map_axis(axis))
    x_cotangent = jax.vmap(per_map)(x, offset, cotangent)
    return x_cotangent, offset_cotangent(x, offset, cotangent, axis)

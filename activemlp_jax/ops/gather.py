"""Gather implementation: reads rows by index, and adds to the same rows in the backward pass.

A row holds the channels that share an offset. CPUs are fast at this kind of memory access. The map
is padded with the pixels just outside it and flattened into a table of rows, so no index needs a
bounds check.
"""

from functools import partial

import jax
import jax.numpy as jnp

from activemlp_jax.ops.reference import first_index, split_offset

# Padding along the axis, for indices from -2 (see `first_index`) to the length of the axis.
BEFORE, AFTER = 2, 1


def _padding(axis: int, rank: int) -> list[tuple[int, int]]:
    return [(BEFORE, AFTER) if dimension == axis else (0, 0) for dimension in range(rank)]


def _rows(offset: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Find the rows `[H, W, G, 2]` of the table that `offset` `[H, W, G]` reads, and fractions."""
    _, width, groups = offset.shape
    floor, fraction = split_offset(offset, axis)
    index = first_index(floor, offset.shape[axis]) + BEFORE
    h, w, g = (jax.lax.broadcasted_iota(jnp.int32, offset.shape, d) for d in range(3))
    if axis == 0:
        row, step = (index * width + w) * groups + g, width * groups
    else:
        row, step = (h * (width + BEFORE + AFTER) + index) * groups + g, groups
    return jnp.stack([row, row + step], axis=-1), fraction[..., None]


def _read(x: jax.Array, rows: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Read the values `[H, W, G, C / G]` of one map left and right of each position."""
    table = jnp.pad(x, _padding(axis, 3)).reshape(-1, x.shape[-1] // rows.shape[2])
    read = table.at[rows[..., 0]].get, table.at[rows[..., 1]].get
    left, right = (get(mode="promise_in_bounds") for get in read)
    return left, right


def _forward_map(x: jax.Array, offset: jax.Array, axis: int) -> jax.Array:
    rows, fraction = _rows(offset, axis)
    left, right = _read(x, rows, axis)
    return ((1 - fraction) * left + fraction * right).astype(x.dtype).reshape(x.shape)


def _grad_offset_map(x: jax.Array, offset: jax.Array, grad: jax.Array, axis: int) -> jax.Array:
    rows, _ = _rows(offset, axis)
    left, right = (value.astype(offset.dtype) for value in _read(x, rows, axis))
    slope = grad.reshape(left.shape) * (right - left)
    # The barrier keeps XLA from fusing the reads into the sum. The sum is written out, because
    # CPUs are slow at reducing a short last axis. Both together save a third of the time.
    slope = jax.lax.optimization_barrier(slope)
    return sum((slope[..., s] for s in range(1, slope.shape[-1])), start=slope[..., 0])


def _grad_x_map(x: jax.Array, offset: jax.Array, grad: jax.Array, axis: int) -> jax.Array:
    rows, fraction = _rows(offset, axis)
    group_size = x.shape[-1] // offset.shape[-1]
    grouped = grad.reshape(*offset.shape, 1, group_size).astype(offset.dtype)
    shape = [sum(pair) + side for pair, side in zip(_padding(axis, 3), x.shape, strict=True)]
    table = jnp.zeros(shape, offset.dtype).reshape(-1, group_size)
    terms = jnp.stack([1 - fraction, fraction], axis=-2) * grouped
    padded = table.at[rows].add(terms, mode="promise_in_bounds").reshape(shape)
    return jax.lax.slice_in_dim(padded, BEFORE, BEFORE + x.shape[axis], axis=axis).astype(x.dtype)


def _map_axis(axis: str) -> int:
    return {"h": 0, "w": 1}[axis]


@partial(jax.jit, static_argnums=2)
def forward(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """Sample `x` at the shifted positions."""
    return jax.vmap(partial(_forward_map, axis=_map_axis(axis)))(x, offset)


def grad_offset(x: jax.Array, offset: jax.Array, grad: jax.Array, axis: str) -> jax.Array:
    """Compute the gradient of the offsets, `[B, H, W, G]`, with gathers alone."""
    per_map = partial(_grad_offset_map, axis=_map_axis(axis))
    return jax.vmap(per_map)(x, offset, grad)


def backward(
    x: jax.Array, offset: jax.Array, grad: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of `x` and `offset`."""
    per_map = partial(_grad_x_map, axis=_map_axis(axis))
    grad_x = jax.vmap(per_map)(x, offset, grad)
    return grad_x, grad_offset(x, offset, grad, axis)

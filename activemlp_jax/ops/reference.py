"""Definition of the operator, the reference that all implementations are tested against.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3. The original computes it
as `torchvision.ops.deform_conv2d` with a 1x1 kernel and one offset group per channel.
"""

import jax
import jax.numpy as jnp


def split_offset(offset: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Split the positions, which are coordinate + `offset` along `axis`, into floor and fraction.

    Coordinates are integers, so a position has the same fraction as its offset. The fraction is
    taken from the offset, where it is exact: a float32 position would round 3 - 1e-8 to 3 and read
    on the wrong side of pixel 3.
    """
    floor = jnp.floor(offset)
    coordinate = jax.lax.broadcasted_iota(offset.dtype, offset.shape, axis)
    return coordinate + floor, offset - floor


def first_index(floor: jax.Array, length: int) -> jax.Array:
    """Convert floors of positions to integer indices, from -2 to `length` - 1.

    A position with floor -1 to `length` - 1 has a neighbor inside the map. All other floors, and
    NaN, become -2: both neighbors are then outside, and the cast to integers never overflows.
    """
    touches_map = (floor >= -1) & (floor < length)
    return jnp.where(touches_map, floor, -2).astype(jnp.int32)


def _read(line: jax.Array, index: jax.Array) -> jax.Array:
    """Read the rows of `line` `[L, S]` at `index` `[L]`; rows outside are zero."""
    return line.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def sample_line(line: jax.Array, offset: jax.Array) -> jax.Array:
    """Interpolate `line` `[L, S]` linearly at coordinate + `offset` `[L]`, with zeros outside.

    The derivative with respect to the offset is the right-hand difference
    `line[floor + 1] - line[floor]`, also at exact integers, because `floor` has derivative zero.
    """
    floor, fraction = split_offset(offset, 0)
    index, fraction = first_index(floor, len(line)), fraction[:, None]
    return (1 - fraction) * _read(line, index) + fraction * _read(line, index + 1)


def sample(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """Sample every row or column of `x` `[B, H, W, C]` at offsets `[B, H, W, G]`."""
    line_axis = 1 if axis == "h" else 0  # the other spatial axis, after `vmap` over the batch
    over_groups = jax.vmap(sample_line, in_axes=(-2, -1), out_axes=-2)
    over_lines = jax.vmap(over_groups, in_axes=line_axis, out_axes=line_axis)
    grouped = x.reshape(*offset.shape, x.shape[-1] // offset.shape[-1])
    return jax.vmap(over_lines)(grouped, offset).astype(x.dtype).reshape(x.shape)

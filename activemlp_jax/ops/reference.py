"""The operator's definition, which all other forms are held against.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3. The original computes it
as `torchvision.ops.deform_conv2d` with a 1x1 kernel and one offset group a channel.
"""

import jax
import jax.numpy as jnp


def split_offset(offset: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Integer and fractional part of own coordinate + offset along an axis of `offset`.

    Coordinates are integers, so offset and position have the same fraction. Taken from the
    offset it is exact: float32 would round 3 - 1e-8 to 3 and read on the wrong side of it.
    """
    floor = jnp.floor(offset)
    own = jax.lax.broadcasted_iota(offset.dtype, offset.shape, axis)
    return own + floor, offset - floor


def first_index(floor: jax.Array, length: int) -> jax.Array:
    """`floor` as an integer from -2 to `length` - 1.

    Any place two or more pixels outside reads zeros twice; -2 stands for all of them and for NaN,
    so that the cast to integers never overflows.
    """
    touches_map = (floor >= -1) & (floor < length)
    return jnp.where(touches_map, floor, -2).astype(jnp.int32)


def _read(line: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `line` [L, S] at `index` [L]; zeros where the index is outside."""
    return line.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def sample_line(line: jax.Array, offset: jax.Array) -> jax.Array:
    """Linear interpolation of `line` [L, S] at own coordinate + `offset` [L], zeros outside.

    The derivative by the offset is the right-hand difference `line[floor + 1] - line[floor]`, at
    exact integers too, because `floor` has derivative zero.
    """
    floor, fraction = split_offset(offset, 0)
    index, fraction = first_index(floor, len(line)), fraction[:, None]
    return (1 - fraction) * _read(line, index) + fraction * _read(line, index + 1)


def sample(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """`sample_line` for all lines of all maps `x` [B, H, W, C], moved by `offset` [B, H, W, G]."""
    line_axis = 1 if axis == "h" else 0  # the other spatial axis, once the batch is mapped
    over_groups = jax.vmap(sample_line, in_axes=(-2, -1), out_axes=-2)
    over_lines = jax.vmap(over_groups, in_axes=line_axis, out_axes=line_axis)
    grouped = x.reshape(*offset.shape, x.shape[-1] // offset.shape[-1])
    return jax.vmap(over_lines)(grouped, offset).astype(x.dtype).reshape(x.shape)

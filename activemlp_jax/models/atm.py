"""The Active Token Mixer's operator: read features at learned positions along one axis.

`sample_axis` is the only entry. Its definition is `_sample_line`, one line of one channel
group; everything around it only maps that over batch, lines and groups. Other forms of the
operator belong in `IMPLEMENTATIONS` and must agree with it in values, gradients and edges.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3. The original computes it
as `torchvision.ops.deform_conv2d` with a 1x1 kernel and one offset group a channel.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def _read(line: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `line` [L, S] at `index` [L]; zeros where the index is outside."""
    return line.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _sample_line(line: jax.Array, offset: jax.Array) -> jax.Array:
    """Linear interpolation of `line` [L, S] at own coordinate + `offset` [L], zeros outside.

    The derivative by the offset is the right-hand difference `line[floor + 1] - line[floor]`, at
    exact integers too, because `floor` has derivative zero.
    """
    length = line.shape[0]
    # Coordinates are integers, so offset and position have the same fraction. Taken from the
    # offset it is exact: float32 would round 3 - 1e-8 to 3 and read on the wrong side of it.
    offset_floor = jnp.floor(offset)
    fraction = (offset - offset_floor)[:, None]
    floor = jnp.arange(length, dtype=offset.dtype) + offset_floor
    # Any place two or more pixels outside reads zeros twice; -2 stands for all of them and for
    # NaN, so that the cast to integers never overflows.
    touches_map = (floor >= -1) & (floor < length)
    index = jnp.where(touches_map, floor, -2).astype(jnp.int32)
    return (1 - fraction) * _read(line, index) + fraction * _read(line, index + 1)


def _sample_gather(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
    """`x` [B, H, W, G, S] moved by `offset` [B, H, W, G] along `axis`, by gathering groups."""
    line_axis = 1 if axis == "h" else 0  # the other spatial axis, once the batch is mapped
    sample = jax.vmap(_sample_line, in_axes=(-2, -1), out_axes=-2)  # groups
    sample = jax.vmap(sample, in_axes=line_axis, out_axes=line_axis)
    sample = jax.vmap(sample)  # batch
    return sample(x, offset)


IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, str], jax.Array]] = {
    "gather": _sample_gather,
}


def sample_axis(x: ArrayLike, offset: ArrayLike, axis: str, impl: str = "auto") -> jax.Array:
    """Read features at positions shifted along one axis, by linear interpolation.

    With `p = own coordinate + offset` and `f = p - floor(p)`, the result is
    `(1 - f) * x[floor(p)] + f * x[floor(p) + 1]`; outside the map features are zero. Any finite
    offset is safe; a NaN or infinite offset gives NaN where it stands and nowhere else.

    Args:
      x: `[B, H, W, C]`, floating.
      offset: `[B, H, W, G]`, floating, in pixels; G divides C, and group g moves the channels
        `g*C/G` to `(g+1)*C/G - 1`.
      axis: 'h' or 'w', the axis the offsets move along.
      impl: 'auto', or a name in `IMPLEMENTATIONS`.

    Returns:
      `[B, H, W, C]`, dtype of `x`; offsets and interpolation are computed in float32 or wider.

    Raises:
      ValueError: G does not divide C, the leading shapes differ, or `axis` or `impl` is unknown.

    Source: Active Token Mixer, section 3.
    """
    x, offset = jnp.asarray(x), jnp.asarray(offset)
    chex.assert_rank([x, offset], 4, exception_type=ValueError)
    batch, height, width, channels = x.shape
    groups = offset.shape[-1]
    if offset.shape[:3] != x.shape[:3]:
        raise ValueError(
            f"sample_axis: offset {offset.shape} must have the batch, height and width of x "
            f"{x.shape}"
        )
    if groups == 0 or channels % groups:
        raise ValueError(
            f"sample_axis: offset {offset.shape} has {groups} groups, which do not divide the "
            f"{channels} channels of x {x.shape}"
        )
    if axis not in ("h", "w"):
        raise ValueError(f"sample_axis: axis is {axis!r}, expected 'h' or 'w'")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"sample_axis: impl is {impl!r}, expected 'auto' or one of {sorted(IMPLEMENTATIONS)}"
        )

    dtype = jnp.promote_types(jnp.promote_types(x.dtype, offset.dtype), jnp.float32)
    grouped = x.reshape(batch, height, width, groups, channels // groups)
    sample = IMPLEMENTATIONS["gather" if impl == "auto" else impl]
    return sample(grouped, offset.astype(dtype), axis).astype(x.dtype).reshape(x.shape)

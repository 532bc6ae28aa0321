"""GPU implementation: Pallas kernels for Triton that read and write each map about once.

The forward kernel reads features by index. In the backward kernel, each feature sums the gradients
of the positions that read it, always in the same order; a scatter-add would be nondeterministic.
Which positions read a feature depends on the data, but none is farther away than the longest offset
of the image. The sum goes over that distance, so the short offsets of trained models cost little.
On other platforms the kernels run in interpret mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from activemlp_jax.ops.pallas_batching import on_batches
from activemlp_jax.ops.reference import first_index, split_offset

TILE_ELEMENTS = 1024
MAX_TILE_CHANNELS = 64  # a single group may have more
WARPS = 4
MIN_CAPABILITY = 8.0  # compute capability of Ampere, the oldest that Pallas compiles for


def runs_here() -> bool:
    """Return whether the kernels support this process's GPU; True if it has none."""
    if jax.default_backend() != "gpu":
        return True  # this process may compile for another machine
    capability = str(jax.devices()[0].compute_capability)  # '9.0' on NVIDIA, a name on AMD
    return not capability[0].isdigit() or float(capability) >= MIN_CAPABILITY


class TileShape(NamedTuple):
    """Size of the tile of one program: positions, groups, and channels per group.

    All are powers of two, as Triton requires. `channels` is the group size, rounded up.
    """

    positions: int
    groups: int
    channels: int


def _tile_shape(groups: int, group_size: int) -> TileShape:
    channels = pl.next_power_of_2(group_size)
    divisor = groups & -groups  # the largest power of two that divides `groups`
    tile_groups = max(1, min(divisor, MAX_TILE_CHANNELS // channels))
    return TileShape(max(1, TILE_ELEMENTS // (tile_groups * channels)), tile_groups, channels)


class Tile(NamedTuple):
    """The part of a batch that one program computes, P positions by GB groups by S channels.

    Maps are flattened to `[B, H * W, C]`.

    Args:
      image: index of the map in the batch.
      position: `[P, GB]`, index of the row in the flattened map.
      group: `[P, GB]`, index of the group.
      exists: `[P, GB]`, whether the position is inside the map.
      coordinate: `[P, GB]`, coordinate of the position along the axis.
      step: distance, in rows, between neighbors along the axis.
      length: length of the axis.
      shape: P, GB and S.
      group_size: channels per group, at most S.
    """

    image: jax.Array
    position: jax.Array
    group: jax.Array
    exists: jax.Array
    coordinate: jax.Array
    step: int
    length: int
    shape: TileShape
    group_size: int

    def offsets(self, offset: Any, distance: Any = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Load offsets `distance` pixels away: floors, fractions, and a mask; all `[P, GB]`."""
        coordinate = self.coordinate + distance
        exists = self.exists & (coordinate >= 0) & (coordinate < self.length)
        ref = offset.at[self.image, self.position + distance * self.step, self.group]
        values = triton.load(ref, mask=exists, other=0.0)
        floor = jnp.floor(values)
        return floor, values - floor, exists

    def features(self, rows: Any, distance: Any, mask: jax.Array) -> jax.Array:
        """Load features `[P, GB, S]`, float32, `distance` pixels away; 0 where `mask` is false."""
        ref, mask = self.feature_refs(rows, distance, mask)
        return triton.load(ref, mask=mask, other=0).astype(jnp.float32)

    def feature_refs(self, rows: Any, distance: Any, mask: jax.Array) -> tuple[Any, jax.Array]:
        """Return references to features `distance` pixels away, and `mask` without padding."""
        shape = tuple(self.shape)
        index = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        row = (self.position + distance * self.step)[..., None]
        channel = self.group[..., None] * self.group_size + index
        mask = jnp.broadcast_to(mask[..., None], shape)
        if self.shape.channels != self.group_size:
            mask = mask & (index < self.group_size)
        return rows.at[self.image, jnp.broadcast_to(row, shape), channel], mask


def _program_tile(axis: str, shape: TileShape, group_size: int, height: int, width: int) -> Tile:
    size = (shape.positions, shape.groups)
    position = jax.lax.broadcasted_iota(jnp.int32, size, 0) + pl.program_id(1) * shape.positions
    group = jax.lax.broadcasted_iota(jnp.int32, size, 1) + pl.program_id(2) * shape.groups
    coordinate = position // width if axis == "h" else position % width
    step, length = (width, height) if axis == "h" else (1, width)
    exists = position < height * width
    image = pl.program_id(0)
    return Tile(image, position, group, exists, coordinate, step, length, shape, group_size)


def _read(tile: Tile, x: Any, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Load features `[P, GB, S]` left and right of positions; `floor` is that of the offsets."""
    index = tile.coordinate.astype(jnp.float32) + floor
    distance = first_index(index, tile.length) - tile.coordinate
    left, right = (
        tile.features(x, distance + k, tile.exists & (index >= -k) & (index < tile.length - k))
        for k in (0, 1)
    )
    return left, right


def _forward_kernel(make_tile: Callable[[], Tile], x: Any, offset: Any, out: Any) -> None:
    tile = make_tile()
    floor, fraction, _ = tile.offsets(offset)
    left, right = _read(tile, x, floor)
    fraction = fraction[..., None]
    ref, mask = tile.feature_refs(out, 0, tile.exists)
    triton.store(ref, ((1 - fraction) * left + fraction * right).astype(out.dtype), mask=mask)


def _backward_kernel(
    make_tile: Callable[[], Tile],
    x: Any,
    offset: Any,
    grad: Any,
    reach: Any,
    x_out: Any,
    offset_out: Any,
) -> None:
    tile = make_tile()
    floor, _, _ = tile.offsets(offset)
    left, right = _read(tile, x, floor)
    own_grad = tile.features(grad, 0, tile.exists)
    ref = offset_out.at[tile.image, tile.position, tile.group]
    triton.store(ref, (own_grad * (right - left)).sum(-1), mask=tile.exists)

    def add(distance: jax.Array, total: jax.Array) -> jax.Array:
        floor, fraction, exists = tile.offsets(offset, distance)
        # The left one of the two pixels that the position reads, relative to this feature: 0 if it
        # is this feature, -1 if this feature is the right one.
        left_pixel = floor + distance.astype(jnp.float32)
        reads = exists & ((left_pixel == 0) | (left_pixel == -1))
        weight = jnp.where(reads, jnp.where(left_pixel == 0, 1 - fraction, fraction), 0.0)
        return total + weight[..., None] * tile.features(grad, distance, reads)

    first, end = reach[tile.image, 0], reach[tile.image, 1]
    total = jax.lax.fori_loop(first, end, add, jnp.zeros(tile.shape, jnp.float32))
    ref, mask = tile.feature_refs(x_out, 0, tile.exists)
    triton.store(ref, total.astype(x_out.dtype), mask=mask)


def _reach(offset: jax.Array, axis: str) -> jax.Array:
    """Find the range `[B, 2]`, end excluded, of distances to the positions that read a feature."""
    dim = {"h": 1, "w": 2}[axis]
    length = offset.shape[dim]
    index, _ = split_offset(offset, dim)
    coordinate = jax.lax.broadcasted_iota(jnp.int32, offset.shape, dim)
    touches_map = (index >= -1) & (index < length)
    # A position that reads nothing counts as if its offset were 0.
    floor = jnp.where(touches_map, index, coordinate).astype(jnp.int32) - coordinate
    bounds = jnp.stack([-1 - floor.max((1, 2, 3)), 1 - floor.min((1, 2, 3))], axis=-1)
    return jnp.clip(bounds, 1 - length, length)


def _call(
    kernel: Callable[..., None], axis: str, outs: list[int], *arrays: jax.Array
) -> list[jax.Array]:
    """Run a kernel over tiles; results have the shape and dtype of `arrays[k]` for k in `outs`."""
    x, offset = arrays[:2]
    batch, height, width, channels = x.shape
    groups = offset.shape[-1]
    group_size = channels // groups
    tile = _tile_shape(groups, group_size)
    rows = [a.reshape(batch, -1, a.shape[-1]) if a.ndim == 4 else a for a in arrays]

    def run(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(kernel, partial(_program_tile, axis, tile, group_size, height, width)),
            grid=(batch, pl.cdiv(height * width, tile.positions), groups // tile.groups),
            out_shape=[jax.ShapeDtypeStruct(rows[k].shape, rows[k].dtype) for k in outs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
        )

    results = jax.lax.platform_dependent(*rows, cuda=run(False), default=run(True))
    return [result.reshape(arrays[k].shape) for result, k in zip(results, outs, strict=True)]


def _forward(axis: str, x: jax.Array, offset: jax.Array) -> jax.Array:
    return _call(_forward_kernel, axis, [0], x, offset)[0]


def _backward(axis: str, x: jax.Array, offset: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
    reach = _reach(offset, axis)
    return tuple(_call(_backward_kernel, axis, [0, 1], x, offset, grad, reach))


forward, backward = on_batches(_forward), on_batches(_backward)

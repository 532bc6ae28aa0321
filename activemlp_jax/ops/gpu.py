"""The operator as kernels for GPUs, that read and write each map about once.

Forwards they read by index. Backwards each feature sums the cotangents of the positions that read
it, always in the same order, where scattered additions would have an order of chance. Which these
are is not known before, but they are no further away than the longest offset of the image: the sum
goes over that distance, so that short offsets, as a model has, cost little. On other machines the
kernels run interpreted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from activemlp_jax.ops.kernels import as_form
from activemlp_jax.ops.reference import first_index, split_offset

BLOCK = 1024  # elements of a program
CHANNELS = 64  # of them neighbours, at most
WARPS = 4
OLDEST = 8.0  # the compute capability that these kernels' compiler begins with: Ampere's


def runs_here() -> bool:
    """Whether the GPU of this process, if there is one, is not too old for kernels."""
    if jax.default_backend() != "gpu":
        return True  # a program may be made here for another machine
    capability = str(jax.devices()[0].compute_capability)  # '9.0'; AMD's are names
    return not capability[0].isdigit() or float(capability) >= OLDEST


class Tile(NamedTuple):
    """What one program works on: `positions` of a map, `groups` of channels, `share` of each.

    All are powers of two, as the kernels' language wants; `share` may be more than there are.
    """

    positions: int
    groups: int
    share: int


def _tile(groups: int, share: int) -> Tile:
    share = pl.next_power_of_2(share)
    divisor = groups & -groups  # the largest power of two that divides them
    width = max(1, min(divisor, CHANNELS // share))
    return Tile(max(1, BLOCK // (width * share)), width, share)


class Places(NamedTuple):
    """The positions and groups of one program, in maps that are lists of rows, `[B, H * W, ..]`.

    Args:
      image: number of the map.
      position: `[P, GB]`, the row's number.
      group: `[P, GB]`.
      exists: `[P, GB]`, whether the map has that position.
      own: `[P, GB]`, coordinate along the axis.
      step: rows from a place to the next along the axis.
      length: of the axis.
      tile: how many these are.
      share: channels of a group.
    """

    image: jax.Array
    position: jax.Array
    group: jax.Array
    exists: jax.Array
    own: jax.Array
    step: int
    length: int
    tile: Tile
    share: int

    def offsets(self, offset: Any, distance: Any = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Floor and fraction `[P, GB]` of the offsets so many places further, and which exist."""
        place = self.own + distance
        exists = self.exists & (place >= 0) & (place < self.length)
        at = offset.at[self.image, self.position + distance * self.step, self.group]
        found = triton.load(at, mask=exists, other=0.0)
        floor = jnp.floor(found)
        return floor, found - floor, exists

    def features(self, rows: Any, distance: Any, mask: jax.Array) -> jax.Array:
        """`[P, GB, S]`, float32, of the rows so many places further; 0 where `mask` is not."""
        at, mask = self.at(rows, distance, mask)
        return triton.load(at, mask=mask, other=0).astype(jnp.float32)

    def at(self, rows: Any, distance: Any, mask: jax.Array) -> tuple[Any, jax.Array]:
        """Where those are, and which of them exist."""
        shape = tuple(self.tile)
        number = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        row = (self.position + distance * self.step)[..., None]
        channel = self.group[..., None] * self.share + number
        mask = jnp.broadcast_to(mask[..., None], shape)
        if self.tile.share != self.share:
            mask = mask & (number < self.share)
        return rows.at[self.image, jnp.broadcast_to(row, shape), channel], mask


def _places(axis: str, tile: Tile, share: int, height: int, width: int) -> Places:
    shape = (tile.positions, tile.groups)
    position = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(1) * tile.positions
    group = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + pl.program_id(2) * tile.groups
    own = position // width if axis == "h" else position % width
    step, length = (width, height) if axis == "h" else (1, width)
    exists = position < height * width
    return Places(pl.program_id(0), position, group, exists, own, step, length, tile, share)


def _read(places: Places, x: Any, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features left and right of the positions, `[P, GB, S]`."""
    place = places.own.astype(jnp.float32) + floor
    distance = first_index(place, places.length) - places.own
    left, right = (
        places.features(
            x, distance + k, places.exists & (place >= -k) & (place < places.length - k)
        )
        for k in (0, 1)
    )
    return left, right


def _forward_kernel(places: Callable[[], Places], x: Any, offset: Any, out: Any) -> None:
    here = places()
    floor, fraction, _ = here.offsets(offset)
    left, right = _read(here, x, floor)
    fraction = fraction[..., None]
    at, mask = here.at(out, 0, here.exists)
    triton.store(at, ((1 - fraction) * left + fraction * right).astype(out.dtype), mask=mask)


def _backward_kernel(
    places: Callable[[], Places],
    x: Any,
    offset: Any,
    cotangent: Any,
    reach: Any,
    x_out: Any,
    offset_out: Any,
) -> None:
    here = places()
    floor, _, _ = here.offsets(offset)
    left, right = _read(here, x, floor)
    given = here.features(cotangent, 0, here.exists)
    at = offset_out.at[here.image, here.position, here.group]
    triton.store(at, (given * (right - left)).sum(-1), mask=here.exists)

    def add(distance: jax.Array, total: jax.Array) -> jax.Array:
        floor, fraction, exists = here.offsets(offset, distance)
        # Where the position that far away reads: here, or one place before.
        found = floor + distance.astype(jnp.float32)
        touches = exists & ((found == 0) | (found == -1))
        weight = jnp.where(touches, jnp.where(found == 0, 1 - fraction, fraction), 0.0)
        return total + weight[..., None] * here.features(cotangent, distance, touches)

    first, last = reach[here.image, 0], reach[here.image, 1]
    total = jax.lax.fori_loop(first, last, add, jnp.zeros(here.tile, jnp.float32))
    at, mask = here.at(x_out, 0, here.exists)
    triton.store(at, total.astype(x_out.dtype), mask=mask)


def _reach(offset: jax.Array, axis: str) -> jax.Array:
    """`[B, 2]`: from where to before where positions lie, of an image, that read a feature."""
    dim = {"h": 1, "w": 2}[axis]
    length = offset.shape[dim]
    place, _ = split_offset(offset, dim)
    own = jax.lax.broadcasted_iota(jnp.int32, offset.shape, dim)
    floor = jnp.where((place >= -1) & (place < length), place, own).astype(jnp.int32) - own
    bounds = jnp.stack([-1 - floor.max((1, 2, 3)), 1 - floor.min((1, 2, 3))], axis=-1)
    return jnp.clip(bounds, 1 - length, length)


def _call(
    kernel: Callable[..., None], axis: str, outs: list[int], *arrays: jax.Array
) -> list[jax.Array]:
    """Run a kernel over tiles of maps.

    Args:
      kernel: that takes where it is, the arrays, and what it writes.
      axis: the axis the offsets move along.
      outs: of which arrays the results have shape and dtype.
      arrays: `[B, H, W, ..]`, the maps and the offsets first; or less, which are left as they are.
    """
    x, offset = arrays[:2]
    batch, height, width, channels = x.shape
    groups = offset.shape[-1]
    share = channels // groups
    tile = _tile(groups, share)
    rows = [a.reshape(batch, -1, a.shape[-1]) if a.ndim == 4 else a for a in arrays]

    def run(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(kernel, partial(_places, axis, tile, share, height, width)),
            grid=(batch, pl.cdiv(height * width, tile.positions), groups // tile.groups),
            out_shape=[jax.ShapeDtypeStruct(rows[k].shape, rows[k].dtype) for k in outs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
        )

    results = jax.lax.platform_dependent(*rows, cuda=run(False), default=run(True))
    return [result.reshape(arrays[k].shape) for result, k in zip(results, outs, strict=True)]


def _forward(axis: str, x: jax.Array, offset: jax.Array) -> jax.Array:
    return _call(_forward_kernel, axis, [0], x, offset)[0]


def _backward(
    axis: str, x: jax.Array, offset: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    reach = _reach(offset, axis)
    return tuple(_call(_backward_kernel, axis, [0, 1], x, offset, cotangent, reach))


forward, backward = as_form(_forward, _backward)

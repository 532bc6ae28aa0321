"""TPU implementation: the dense one as Pallas kernels, which keep the weights in registers.

For the dense implementation, XLA materializes arrays several times as large as the map. These
kernels read and write each map once. They repeat the offsets for the channels of a group by a
matmul with a matrix of zeros and ones, which moves nothing between lanes. On other platforms the
kernels run in interpret mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from activemlp_jax.ops.pallas_batching import on_batches

# Finite offsets are clipped to +-FAR, which is outside any map. NaN and infinity become NOT_FINITE,
# because zero times NaN would spread NaN in the matmul.
FAR, NOT_FINITE = 2.0**14, 2.0**16
dot = partial(
    jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)
Kernel = Callable[..., None]


def _positions(
    offset: jax.Array, expand: jax.Array, coordinate: jax.Array
) -> tuple[jax.Array, ...]:
    """Compute offset, floor of the position and fraction, `[N, C]`, from offsets `[N, G]`."""
    offset = dot(offset, expand, (((1,), (0,)), ((), ())))
    floor = jnp.floor(offset)
    return offset, coordinate + floor, offset - floor


def _weight(floor: jax.Array, fraction: jax.Array, index: jax.Array) -> jax.Array:
    """Compute the weight of the pixel `index` in each sampled value."""
    return jnp.where(floor == index, 1 - fraction, jnp.where(floor + 1 == index, fraction, 0.0))


def _slope(floor: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
    """Compute the share of the pixel `index` in the derivatives with respect to the offsets."""
    return jnp.where(floor + 1 == index, values, jnp.where(floor == index, -values, 0.0))


def _initial_sum(offset: jax.Array) -> jax.Array:
    """Start a sum at NaN where the offset was NaN or infinite, and at zero elsewhere."""
    return jnp.where(offset == NOT_FINITE, jnp.nan, 0.0)


def _sum_groups(slope: jax.Array, expand: jax.Array) -> jax.Array:
    """Sum `[N, C]` over the channels that share an offset, to `[N, G]`."""
    return dot(slope, expand, (((1,), (1,)), ((), ())))


def _for_each(count: int, body: Callable[[jax.Array], None]) -> None:
    jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _coordinates(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


# Along the height, a block is [H, some columns, C], and the kernels loop over all pairs of rows.
# Along the width, it is [some rows, W, C], and they loop over its rows and the pixels of each row.


def _forward_h(x: Any, offset: Any, expand: Any, out: Any) -> None:
    def one_row(i: jax.Array) -> None:
        repeated, floor, fraction = _positions(offset[i], expand[...], i.astype(jnp.float32))

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + _weight(floor, fraction, k.astype(jnp.float32)) * x[k].astype(
                jnp.float32
            )

        out[i] = jax.lax.fori_loop(0, len(x), add, _initial_sum(repeated)).astype(out.dtype)

    _for_each(len(x), one_row)


def _backward_h(
    x: Any, offset: Any, grad: Any, expand: Any, x_out: Any, offset_out: Any, sums: Any
) -> None:
    sums[...] = jnp.zeros_like(sums)

    def one_row(i: jax.Array) -> None:
        _, floor, fraction = _positions(offset[i], expand[...], i.astype(jnp.float32))
        row_grad = grad[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            index = k.astype(jnp.float32)
            sums[k] += _weight(floor, fraction, index) * row_grad
            return total + _slope(floor, x[k].astype(jnp.float32), index)

        total = jax.lax.fori_loop(0, len(x), add, jnp.zeros_like(floor))
        offset_out[i] = _sum_groups(row_grad * total, expand[...])

    _for_each(len(x), one_row)
    x_out[...] = sums[...].astype(x_out.dtype)


def _forward_w(x: Any, offset: Any, expand: Any, out: Any, row: Any) -> None:
    def one_row(i: jax.Array) -> None:
        repeated, floor, fraction = _positions(offset[i], expand[...], _coordinates(row.shape))
        row[...] = x[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + _weight(floor, fraction, k.astype(jnp.float32)) * row[pl.ds(k, 1)]

        out[i] = jax.lax.fori_loop(0, len(row), add, _initial_sum(repeated)).astype(out.dtype)

    _for_each(len(x), one_row)


def _backward_w(
    x: Any,
    offset: Any,
    grad: Any,
    expand: Any,
    x_out: Any,
    offset_out: Any,
    row: Any,
    sums: Any,
) -> None:
    def one_row(i: jax.Array) -> None:
        _, floor, fraction = _positions(offset[i], expand[...], _coordinates(row.shape))
        row_grad = grad[i].astype(jnp.float32)
        row[...] = x[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            index = k.astype(jnp.float32)
            weighted = _weight(floor, fraction, index) * row_grad
            sums[pl.ds(k, 1)] = jnp.sum(weighted, axis=0, keepdims=True)
            return total + _slope(floor, row[pl.ds(k, 1)], index)

        total = jax.lax.fori_loop(0, len(row), add, jnp.zeros_like(floor))
        x_out[i] = sums[...].astype(x_out.dtype)
        offset_out[i] = _sum_groups(row_grad * total, expand[...])

    _for_each(len(x), one_row)


def _call(
    kernel: Kernel, scratch_count: int, axis: str, outs: list[int], *arrays: jax.Array
) -> Any:
    """Run a kernel over blocks; results have the shape and dtype of `arrays[k]` for k in `outs`."""
    x, offset = arrays[:2]
    batch, height, width, channels = x.shape
    expand = jnp.repeat(
        jnp.eye(offset.shape[-1], dtype=jnp.float32), channels // offset.shape[-1], axis=1
    )
    rows = 8 * 4 // x.dtype.itemsize  # rows of one tile of TPU memory

    def block(array: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if axis == "h":
            shape = (None, height, min(rows, width), array.shape[-1])
            return pl.BlockSpec(shape, lambda b, i: (b, 0, i, 0))
        shape = (None, min(rows, height), width, array.shape[-1])
        return pl.BlockSpec(shape, lambda b, i: (b, i, 0, 0))

    scratch_shape = (height, min(rows, width), channels) if axis == "h" else (width, channels)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]

    def run(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=(batch, pl.cdiv(width if axis == "h" else height, rows)),
            in_specs=[
                *map(block, shapes),
                pl.BlockSpec(expand.shape, lambda *_: (0, 0)),
            ],
            out_specs=[block(shapes[k]) for k in outs],
            out_shape=[shapes[k] for k in outs],
            scratch_shapes=[pltpu.VMEM(scratch_shape, jnp.float32)] * scratch_count,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            interpret=interpret,
        )

    finite = jnp.where(jnp.isfinite(offset), jnp.clip(offset, -FAR, FAR), NOT_FINITE)
    return jax.lax.platform_dependent(
        x, finite, *arrays[2:], expand, tpu=run(False), default=run(True)
    )


def _forward(axis: str, x: jax.Array, offset: jax.Array) -> jax.Array:
    if axis == "h":
        return _call(_forward_h, 0, axis, [0], x, offset)[0]
    return _call(_forward_w, 1, axis, [0], x, offset)[0]


def _backward(
    axis: str, x: jax.Array, offset: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if axis == "h":
        return tuple(_call(_backward_h, 1, axis, [0, 1], x, offset, grad))
    return tuple(_call(_backward_w, 2, axis, [0, 1], x, offset, grad))


forward, backward = on_batches(_forward), on_batches(_backward)

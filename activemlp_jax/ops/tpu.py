"""The dense form as kernels for TPUs, which keep the weights of a line in registers.

XLA writes parts of the dense form to memory, several times the map; these kernels read and write
each map once. An offset stands for its channels by a product with a matrix of zeros and ones, so
that nothing is moved between lanes. On other machines the kernels run interpreted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from activemlp_jax.ops.kernels import as_form

# Offsets are cut to +-FAR, which is outside any map; those that are not finite become NOT_FINITE,
# as zero times NaN would spread in the product.
FAR, NOT_FINITE = 2.0**14, 2.0**16
dot = partial(
    jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)
Kernel = Callable[..., None]


def _positions(offset: jax.Array, expand: jax.Array, own: jax.Array) -> tuple[jax.Array, ...]:
    """Of offsets [N, G], for each channel [N, C]: offset, floor of the position, fraction."""
    offset = dot(offset, expand, (((1,), (0,)), ((), ())))
    floor = jnp.floor(offset)
    return offset, own + floor, offset - floor


def _weight(floor: jax.Array, fraction: jax.Array, place: jax.Array) -> jax.Array:
    return jnp.where(floor == place, 1 - fraction, jnp.where(floor + 1 == place, fraction, 0.0))


def _slope(floor: jax.Array, values: jax.Array, place: jax.Array) -> jax.Array:
    return jnp.where(floor + 1 == place, values, jnp.where(floor == place, -values, 0.0))


def _start(offset: jax.Array) -> jax.Array:
    return jnp.where(offset == NOT_FINITE, jnp.nan, 0.0)


def _group(slope: jax.Array, expand: jax.Array) -> jax.Array:
    """Sums [N, C] over the channels that share an offset, [N, G]."""
    return dot(slope, expand, (((1,), (1,)), ((), ())))


def _each(count: int, body: Callable[[jax.Array], None]) -> None:
    jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _own_along(shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


# Along the height, a block is [H, some columns, C] and the loops go over pairs of rows. Along the
# width it is [some rows, W, C], and they go over rows and the places of a row.


def _forward_h(x: Any, offset: Any, expand: Any, out: Any) -> None:
    def one_row(i: jax.Array) -> None:
        moved, floor, fraction = _positions(offset[i], expand[...], i.astype(jnp.float32))

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + _weight(floor, fraction, k.astype(jnp.float32)) * x[k].astype(
                jnp.float32
            )

        out[i] = jax.lax.fori_loop(0, len(x), add, _start(moved)).astype(out.dtype)

    _each(len(x), one_row)


def _backward_h(
    x: Any, offset: Any, cotangent: Any, expand: Any, x_out: Any, offset_out: Any, sums: Any
) -> None:
    sums[...] = jnp.zeros_like(sums)

    def one_row(i: jax.Array) -> None:
        _, floor, fraction = _positions(offset[i], expand[...], i.astype(jnp.float32))
        given = cotangent[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            place = k.astype(jnp.float32)
            sums[k] += _weight(floor, fraction, place) * given
            return total + _slope(floor, x[k].astype(jnp.float32), place)

        total = jax.lax.fori_loop(0, len(x), add, jnp.zeros_like(floor))
        offset_out[i] = _group(given * total, expand[...])

    _each(len(x), one_row)
    x_out[...] = sums[...].astype(x_out.dtype)


def _forward_w(x: Any, offset: Any, expand: Any, out: Any, row: Any) -> None:
    def one_row(i: jax.Array) -> None:
        moved, floor, fraction = _positions(offset[i], expand[...], _own_along(row.shape))
        row[...] = x[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            return total + _weight(floor, fraction, k.astype(jnp.float32)) * row[pl.ds(k, 1)]

        out[i] = jax.lax.fori_loop(0, len(row), add, _start(moved)).astype(out.dtype)

    _each(len(x), one_row)


def _backward_w(
    x: Any,
    offset: Any,
    cotangent: Any,
    expand: Any,
    x_out: Any,
    offset_out: Any,
    row: Any,
    sums: Any,
) -> None:
    def one_row(i: jax.Array) -> None:
        _, floor, fraction = _positions(offset[i], expand[...], _own_along(row.shape))
        given = cotangent[i].astype(jnp.float32)
        row[...] = x[i].astype(jnp.float32)

        def add(k: jax.Array, total: jax.Array) -> jax.Array:
            place = k.astype(jnp.float32)
            weighted = _weight(floor, fraction, place) * given
            sums[pl.ds(k, 1)] = jnp.sum(weighted, axis=0, keepdims=True)
            return total + _slope(floor, row[pl.ds(k, 1)], place)

        total = jax.lax.fori_loop(0, len(row), add, jnp.zeros_like(floor))
        x_out[i] = sums[...].astype(x_out.dtype)
        offset_out[i] = _group(given * total, expand[...])

    _each(len(x), one_row)


def _call(kernel: Kernel, scratch: int, axis: str, outs: list[int], *arrays: jax.Array) -> Any:
    """Run a kernel over blocks of maps.

    Args:
      kernel: that takes a block of each array, the matrix of zeros and ones, blocks for results
        and float32 scratch.
      scratch: how many arrays of scratch, each as large as what a sum goes over.
      axis: the axis the offsets move along.
      outs: of which arrays the results have shape and dtype.
      arrays: `[B, H, W, ..]`, the maps and the offsets first.
    """
    x, offset = arrays[:2]
    batch, height, width, channels = x.shape
    expand = jnp.repeat(
        jnp.eye(offset.shape[-1], dtype=jnp.float32), channels // offset.shape[-1], axis=1
    )
    rows = 8 * 4 // x.dtype.itemsize  # of a tile in memory

    def block(array: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if axis == "h":
            shape = (None, height, min(rows, width), array.shape[-1])
            return pl.BlockSpec(shape, lambda b, i: (b, 0, i, 0))
        shape = (None, min(rows, height), width, array.shape[-1])
        return pl.BlockSpec(shape, lambda b, i: (b, i, 0, 0))

    sums = (height, min(rows, width), channels) if axis == "h" else (width, channels)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]

    def run(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=(batch, pl.cdiv(width if axis == "h" else height, rows)),
            in_specs=[
                *map(block, shapes),
                pl.BlockSpec(expand.shape, lambda *_: (0, 0)),
            ],
            out_specs=[block(shapes[number]) for number in outs],
            out_shape=[shapes[number] for number in outs],
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32)] * scratch,
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
    axis: str, x: jax.Array, offset: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if axis == "h":
        return tuple(_call(_backward_h, 1, axis, [0, 1], x, offset, cotangent))
    return tuple(_call(_backward_w, 2, axis, [0, 1], x, offset, cotangent))


forward, backward = as_form(_forward, _backward)

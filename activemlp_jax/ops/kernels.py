"""What kernels need to be used as any function is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def _batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of batches of maps, for several devices and under `jax.vmap`.

    The compiler cannot divide a kernel among devices. Where the program says for which mesh it is
    (`jax.set_mesh`), each device takes its share of the batch.
    """

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        is_automatic = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
        if mesh.empty or not is_automatic or arrays[0].shape[0] % mesh.size:
            return function(*arrays)
        rows = jax.P(mesh.axis_names)
        return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)

    @run.def_vmap
    def run_more(size: int, is_batched: Any, *arrays: jax.Array) -> Any:
        arrays = tuple(
            array if has_batch else jnp.broadcast_to(array, (size, *array.shape))
            for array, has_batch in zip(arrays, is_batched, strict=True)
        )
        merged = run(*(array.reshape(-1, *array.shape[2:]) for array in arrays))
        split = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), merged)
        return split, jax.tree.map(lambda _: True, split)

    return jax.jit(run)  # which traces a kernel once for all blocks of a shape


def as_form(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of a form, of batches, from kernels that take the axis first.

    Args:
      forward: of an axis, maps and offsets.
      backward: of an axis, maps, offsets and cotangents.
    """
    forwards, backwards = (
        {axis: _batched(partial(function, axis)) for axis in "hw"}
        for function in (forward, backward)
    )

    def run_forward(x: jax.Array, offset: jax.Array, axis: str) -> jax.Array:
        return forwards[axis](x, offset)

    def run_backward(
        x: jax.Array, offset: jax.Array, cotangent: jax.Array, axis: str
    ) -> tuple[jax.Array, jax.Array]:
        return backwards[axis](x, offset, cotangent)

    return run_forward, run_backward

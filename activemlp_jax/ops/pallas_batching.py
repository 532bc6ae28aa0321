"""Wrappers that let Pallas kernels run under `jax.vmap` and on several devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def _batched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of batches run under `jax.vmap` and on several devices."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> Any:
        # XLA cannot partition a kernel, so each device of the mesh in the context runs the kernel
        # on its part of the batch.
        mesh = jax.sharding.get_abstract_mesh()
        is_automatic = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
        if mesh.empty or not is_automatic or arrays[0].shape[0] % mesh.size:
            return function(*arrays)
        spec = jax.P(mesh.axis_names)
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    @run.def_vmap
    def run_mapped(size: int, is_batched: Any, *arrays: jax.Array) -> Any:
        arrays = tuple(
            array if has_batch else jnp.broadcast_to(array, (size, *array.shape))
            for array, has_batch in zip(arrays, is_batched, strict=True)
        )
        merged = run(*(array.reshape(-1, *array.shape[2:]) for array in arrays))
        split = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), merged)
        return split, jax.tree.map(lambda _: True, split)

    return jax.jit(run)  # traces a kernel once for all blocks of the same shape


def on_batches(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `kernel(axis, *arrays)` as `run(*arrays, axis=..)` for `vmap` and several devices."""
    by_axis = {axis: _batched(partial(kernel, axis)) for axis in "hw"}
    return lambda *arrays, axis: by_axis[axis](*arrays)

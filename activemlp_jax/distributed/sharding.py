"""Meshes and shardings; all other code sees global arrays.

A mesh has two axes. The rows of a batch are split over both, `data` and `fsdp`. Parameters, their
average and the optimizer state are split over `fsdp` and replicated over `data`.
"""

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from activemlp_jax.distributed import hosts
from activemlp_jax.utils.errors import UserError

ROWS = PartitionSpec(("data", "fsdp"))
SMALLEST_SPLIT = 4096  # elements; gathering a smaller array costs more than replicating it


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of the devices of all hosts, with each host's devices next to each other.

    By default, JAX orders the devices of a TPU slice by their position in it, which interleaves
    hosts. In this mesh, host p of P holds rows p * B / P to (p + 1) * B / P - 1 of a batch of B.
    `data` and `fsdp` are the sizes of the axes; -1 for `data` uses all devices. Raises UserError if
    the devices do not fill the mesh.
    """
    devices = jax.devices() if devices is None else devices
    total = len(devices)
    if total % fsdp or (data != -1 and data * fsdp != total):
        wanted = f"{'all' if data == -1 else data} x {fsdp}"
        raise UserError(
            f"config.mesh is {wanted} (data x fsdp), which the {total} devices do not fill"
        )
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(by_host).reshape(total // fsdp, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Wrap `function` so that it is compiled for `mesh`.

    XLA partitions everything except Pallas kernels by itself. The kernels read the mesh from the
    context, so that each device processes its share of the batch.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return run


def describe(mesh: Mesh) -> str:
    """Describe hosts, devices and mesh in one line."""
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{jax.process_count()} host(s), {mesh.size} {device.platform} device(s) "
        f"({device.device_kind}), mesh {axes}"
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Make the sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_fsdp(tree: Any, mesh: Mesh) -> Any:
    """Make shardings for `tree`: each array is split along its longest axis divisible by `fsdp`.

    Arrays without such an axis, or with fewer than `SMALLEST_SPLIT` elements, are replicated. The
    leaves may be anything with a shape and a size, such as `jax.ShapeDtypeStruct`.
    """
    fsdp = mesh.shape["fsdp"]

    def shard(leaf: Any) -> NamedSharding:
        axes = [axis for axis, side in enumerate(leaf.shape) if side % fsdp == 0]
        if fsdp == 1 or leaf.size < SMALLEST_SPLIT or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        spec = ["fsdp" if axis == longest else None for axis in range(leaf.ndim)]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, tree)


def gather(tree: Any, mesh: Mesh) -> Any:
    """Inside a jitted function, make every array of a tree whole on every device."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def scatter(tree: Any, mesh: Mesh) -> Any:
    """Inside a jitted function, split the arrays of a tree as `split_over_fsdp` says."""
    return jax.lax.with_sharding_constraint(tree, split_over_fsdp(tree, mesh))


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """Replicate a tree of arrays to all devices; every host must pass the same whole tree."""
    # Wait, as one host may have to compile the initialization that another found in a cache.
    hosts.wait_for_all("the initial variables")
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Copy a tree that may be split over hosts to numpy arrays, whole on every host."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Make global arrays, split by rows over all devices, from this host's rows."""
    rows = NamedSharding(mesh, ROWS)
    return {
        key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()
    }


def prefetch(
    batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Generator[dict[str, Any]]:
    """Yield `batches` as `put_batch` returns them, starting `ahead` transfers in advance.

    Closing the generator closes `batches`.
    """
    with contextlib.closing(batches):
        placed = (put_batch(batch, mesh) for batch in batches)
        waiting = deque(itertools.islice(placed, ahead))
        while waiting:
            batch = waiting.popleft()
            waiting.extend(itertools.islice(placed, 1))
            yield batch


def place_rows(
    shapes: Mapping[str, tuple[tuple[int, ...], str]], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe what `put_batch` makes of arrays with the given shapes and dtypes, by name."""
    rows = NamedSharding(mesh, ROWS)
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }

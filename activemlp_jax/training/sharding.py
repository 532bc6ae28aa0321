"""Hosts and devices: everything else sees global arrays.

The batch is split over all devices, the state has a copy on each.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from activemlp_jax.errors import UserError


def this_host() -> dict[str, int]:
    """This host's number, `process`, among the `processes` that take part."""
    return {"process": jax.process_index(), "processes": jax.process_count()}


def make_mesh() -> Mesh:
    """One axis, `data`, over all devices of all hosts."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Global arrays, split over the devices by rows, from this host's rows."""
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return {
        key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()
    }


def prefetch(
    batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Generator[dict[str, Any]]:
    """`batches` as `put_batch` gives them, `ahead` of them on their way before they are asked for.

    Closing it closes `batches`.
    """
    with contextlib.closing(batches):
        placed = (put_batch(batch, mesh) for batch in batches)
        waiting = deque(itertools.islice(placed, ahead))
        while waiting:
            batch = waiting.popleft()
            waiting.extend(itertools.islice(placed, 1))
            yield batch


def batch_shapes(batch_size: int, image_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and placement of a training batch of classification."""
    rows = NamedSharding(mesh, PartitionSpec("data"))
    images = (batch_size, image_size, image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(images, np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=rows),
    }


def check_batch_size(key: str, batch_size: int) -> None:
    """Raises UserError if the devices cannot share a batch equally."""
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"config.{key} is {batch_size}, expected a multiple of the {devices} devices"
        )

"""Hosts and devices: everything else sees global arrays.

The batch is split over all devices, the state has a copy on each.
"""

from collections.abc import Mapping
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


def check_batch_size(key: str, batch_size: int) -> None:
    """Raises UserError if the devices cannot share a batch equally."""
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"config.{key} is {batch_size}, expected a multiple of the {devices} devices"
        )

"""Evaluation: sums of a task's counts over a dataset, with each example counted once."""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.base import Sums
from activemlp_jax.utils.types import Batch, Variables

Count = Callable[[Variables, Batch], dict[str, jax.Array]]


def evaluate(
    count: Count,
    weights: Mapping[str, Variables],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, Sums]:
    """Sum `count` over batches for several sets of variables, reading each batch once.

    Args:
      count: jitted function from variables and a batch to sums, which it replicates on all devices.
      weights: variables by name.
      batches: this host's part of the batches of `eval_batches`.
      mesh: mesh of all devices.

    Returns:
      The sums by name of the variables, as numpy arrays.
    """
    sums: dict[str, Sums] = {name: {} for name in weights}
    for batch in batches:
        placed = sharding.put_batch(batch, mesh)
        counted = {name: count(variables, placed) for name, variables in weights.items()}
        for name, values in jax.device_get(counted).items():
            sums[name] = {key: sums[name].get(key, 0) + value for key, value in values.items()}
    return sums

"""Evaluation: the task's counts summed over a data set, each example once."""

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
    """Sums of `count` over `batches` for each of several weights; every batch is read once.

    Args:
      count: a task's, jitted, with results on all devices.
      weights: variables by name.
      batches: this host's, of `eval_batches`.
      mesh: of all devices.
    """
    sums: dict[str, Sums] = {name: {} for name in weights}
    for batch in batches:
        placed = sharding.put_batch(batch, mesh)
        counted = {name: count(variables, placed) for name, variables in weights.items()}
        for name, values in jax.device_get(counted).items():
            sums[name] = {key: sums[name].get(key, 0) + value for key, value in values.items()}
    return sums

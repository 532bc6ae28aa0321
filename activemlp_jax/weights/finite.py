"""Check that weights are finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe_non_finite(tree: Any) -> str | None:
    """Name the first array with non-finite values and count them; None if all are finite.

    For an array that is sharded over hosts, each host checks only its own shards.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            parts = [leaf]
            if isinstance(leaf, jax.Array):
                parts = [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
            bad = sum(np.size(part) - np.isfinite(np.asarray(part)).sum() for part in parts)
            if bad:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return f"{bad:,} of {leaf.size:,} values of {name} are not finite"
    return None

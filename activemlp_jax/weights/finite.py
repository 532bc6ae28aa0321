"""Whether weights are finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe_non_finite(tree: Any) -> str | None:
    """The first array whose values are not all finite, and how many; None if there is none.

    Where hosts share an array, each checks only its own part.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            parts = [leaf]
            if isinstance(leaf, jax.Array):
                parts = [part.data for part in leaf.addressable_shards if part.replica_id == 0]
            bad = sum(np.size(part) - np.isfinite(np.asarray(part)).sum() for part in parts)
            if bad:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return f"{bad:,} of {leaf.size:,} values of {name} are not finite"
    return None

"""Types shared by several subpackages."""

from typing import Any

import jax

Variables = dict[str, Any]  # what a model's `apply` takes: `params` and other collections
Params = Any  # the collection `params`
Batch = dict[str, jax.Array]  # on devices
Record = dict[str, Any]  # values that JSON can represent, by name

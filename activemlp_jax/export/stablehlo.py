"""Export to StableHLO: one program with its weights, which JAX runs without this package.

The file has the format of `jax.export`; JAX's documentation says for how long it can be read.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from activemlp_jax.models.segmentor import Model
from activemlp_jax.utils.types import Variables

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(
    path: Path, model: Model, variables: Variables, image_size: int
) -> dict[str, Any]:
    """Write the inference function of `model` with its weights, for all `PLATFORMS`.

    The function takes `images` `[batch, image_size, image_size, 3]` float32, normalized, in batches
    of any size. It returns the result of `model.apply`; `model` must compute in float32.

    Returns facts that are needed to run the file, as JSON values. Raises ValueError if the images
    are too small for the model.
    """
    weights = jax.tree.map(jnp.asarray, variables)

    def logits(images: jax.Array) -> Any:
        return model.apply(weights, images)

    shape = (*export.symbolic_shape("batch"), image_size, image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    option = "jax_traceback_in_locations_limit"
    frames = getattr(jax.config, option)
    jax.config.update(option, 0)  # keep local file names and line numbers out of the program
    try:
        program = export.export(jax.jit(logits), platforms=PLATFORMS)(images)
    finally:
        jax.config.update(option, frames)
    path.write_bytes(program.serialize())
    return {
        "platforms": program.platforms,
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }

"""Export to StableHLO: one program with its weights, which JAX runs without this package.

The file has the format of `jax.export`, and JAX documents for how long it can read such files.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from activemlp_jax.models.segmentor import Model
from activemlp_jax.utils.types import Variables

PLATFORMS = ("cpu", "cuda", "tpu")


@contextlib.contextmanager
def _without_file_names() -> Iterator[None]:
    """Keep local file names and line numbers out of the program."""
    option = "jax_traceback_in_locations_limit"
    frames = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, frames)


def export_program(model: Model, variables: Variables, image_size: int) -> export.Exported:
    """Export the inference function of `model` with its weights, for all `PLATFORMS`.

    Args:
      model: a model that computes in float32.
      variables: variables of the model.
      image_size: side of the images, in pixels.

    Returns:
      A program that takes images `[batch, image_size, image_size, 3]` float32, normalized, in
      batches of any size, and returns the result of `model.apply` in float32.

    Raises:
      ValueError: if the images are too small for the model.
    """
    weights = jax.tree.map(jnp.asarray, variables)

    def logits(images: jax.Array) -> Any:
        return model.apply(weights, images)

    shape = (*export.symbolic_shape("batch"), image_size, image_size, 3)
    with _without_file_names():
        return export.export(jax.jit(logits), platforms=PLATFORMS)(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )


def write_stablehlo(
    path: Path, model: Model, variables: Variables, image_size: int
) -> dict[str, Any]:
    """Write the program of `export_program`; return JSON-serializable facts for running it."""
    program = export_program(model, variables, image_size)
    path.write_bytes(program.serialize())
    return {
        "platforms": program.platforms,
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }

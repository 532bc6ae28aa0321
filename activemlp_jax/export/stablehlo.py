"""A model as StableHLO: one program with the weights inside, which JAX runs without this package.

Its bytes are those of `jax.export`, which says for how long they can be read.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.architecture import Model

PLATFORMS = ("cpu", "cuda", "tpu")


@contextlib.contextmanager
def _without_file_names() -> Iterator[None]:
    """Operations do not carry which lines of which files on this machine they come from."""
    option = "jax_traceback_in_locations_limit"
    frames = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, frames)


def export_program(model: Model, variables: Variables, image_size: int) -> export.Exported:
    """The inference function of `model` with its weights, for all of `PLATFORMS`.

    Args:
      model: in float32.
      variables: of the model.
      image_size: side of the images, in pixels.

    Returns:
      Takes images `[batch, image_size, image_size, 3]` float32, normalised, any number of them, and
      gives what `model.apply` does, float32.

    Raises:
      ValueError: images too small for the model.
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
    """Write the program of `export_program`; returns what one must know to run it, as JSON."""
    program = export_program(model, variables, image_size)
    path.write_bytes(program.serialize())
    return {
        "platforms": program.platforms,
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }

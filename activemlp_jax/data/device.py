"""What is done to batches on the device, inside the jitted step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`images` `[B, H, W, 3]` uint8 to float32 with `mean` and `std`, both of the range 0 to 1."""
    shape = (1, 1, 1, 3)
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)

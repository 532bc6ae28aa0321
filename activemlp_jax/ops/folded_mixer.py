"""The Active Token Mixer's linear layers folded into one matmul per image.

Each of the three tokens at a position has a linear layer. The results are weighted per channel and
summed, and a fourth linear layer, `proj`, maps the sum. The mixing weights are the same at all
positions of an image: they are computed from the mean of the results over all positions, which
equals the results for the mean tokens. So one matrix per image maps its tokens to the output, which
saves one matmul and materializes four maps fewer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LinearMap(NamedTuple):
    """Parameters of a linear layer, float32 or wider: `kernel` `[I, O]` and `bias` `[O]`."""

    kernel: jax.Array
    bias: jax.Array


def saves_work(height: int, width: int, channels: int) -> bool:
    """Return whether a matrix costs less (3 * C^3 multiply-adds) than it saves (C^2 per pixel)."""
    return height * width > 3 * channels


def mix_tokens(
    tokens: Sequence[jax.Array],
    layers: Sequence[LinearMap],
    proj: LinearMap,
    weigh: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Mix three tokens per position.

    The result is `proj(sum_j weigh(mean(sum_j y_j))[.., j] * y_j)`; `y_j` is layer j of token j.

    Args:
      tokens: three maps `[B, H, W, C]`.
      layers: the linear layer of each token.
      proj: the linear layer that maps the mix.
      weigh: computes mixing weights `[B, 1, 1, C, 3]` from the mean of the results, `[B, 1, 1, C]`.

    Returns:
      `[B, H, W, C]` in the dtype of the tokens.
    """
    # Each image uses every kernel twice, to map the mean tokens and to build the matrix. Both uses
    # read the same copy of the kernel, so devices that share a batch sum one gradient per kernel,
    # not two. Arrays without positions stay float32 or wider until they are multiplied with tokens.
    batch, dtype = tokens[0].shape[0], tokens[0].dtype

    def for_each_image(arrays: Sequence[jax.Array]) -> jax.Array:
        stacked = jnp.stack(arrays)
        return jnp.broadcast_to(stacked[None], (batch, *stacked.shape))

    kernels = for_each_image([layer.kernel for layer in layers])  # [B, 3, C, C]
    biases = for_each_image([layer.bias for layer in layers])  # [B, 3, C]
    means = jnp.stack([token.mean(axis=(1, 2), dtype=kernels.dtype) for token in tokens], axis=1)
    mean = jnp.einsum("bji,bjio->bo", means, kernels) + biases.sum(axis=1)
    weight = jnp.moveaxis(weigh(mean[:, None, None])[:, 0, 0], -1, 1)  # [B, 3, C]

    maps = (kernels * weight[:, :, None]).astype(dtype) @ proj.kernel.astype(dtype)
    maps = maps.reshape(batch, -1, maps.shape[-1])  # [B, 3C, C]
    bias = (biases * weight).sum(axis=1) @ proj.kernel + proj.bias.reshape(1, -1)  # [B, C]
    out = jnp.einsum("bhwi,bio->bhwo", jnp.concatenate(tokens, axis=-1), maps)
    return (out + bias[:, None, None]).astype(dtype)

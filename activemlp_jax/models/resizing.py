"""Resizing and pooling of maps `[B, H, W, C]` as PyTorch defines them, for segmentation heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.models.layers import at_least_float32


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resize `x` `[B, H, W, C]` bilinearly to `height` by `width`, in its dtype.

    Pixel centers are at half-integers, edge pixels extend beyond the map, and downsampling does not
    antialias.

    Source: `torch.nn.functional.interpolate` with `align_corners=False`.
    """
    if x.shape[1:3] == (height, width):
        return x
    shape = (x.shape[0], height, width, x.shape[3])
    resized = jax.image.resize(
        x.astype(at_least_float32(x.dtype)), shape, "linear", antialias=False
    )
    return resized.astype(x.dtype)


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resize `x` `[B, H, W, C]`; if a side of N becomes n, pixel i reads pixel floor(i * N / n).

    Source: `torch.nn.functional.interpolate` with `mode='nearest'`, which differs from
    `jax.image.resize` if the new size is not a multiple of the old.
    """
    for axis, size in ((1, height), (2, width)):
        index = np.arange(size) * x.shape[axis] // size
        x = jnp.take(x, index, axis=axis, unique_indices=False, indices_are_sorted=True)
    return x


@functools.cache
def _pooling_matrix(length: int, bins: int) -> np.ndarray:
    """Make a matrix `[bins, length]`, whose row i averages the pixels of bin i."""
    # Bin i has the pixels floor(i * length / bins) to ceil((i + 1) * length / bins) - 1.
    index = np.arange(bins)
    first, end = index * length // bins, -(-(index + 1) * length // bins)
    pixel = np.arange(length)
    inside = (pixel >= first[:, None]) & (pixel < end[:, None])
    return inside / inside.sum(1, keepdims=True)


def pool_adaptive(x: jax.Array, bins: int) -> jax.Array:
    """Average `x` `[B, H, W, C]` over a grid of `bins` by `bins` parts, which may overlap.

    Source: `torch.nn.functional.adaptive_avg_pool2d`.
    """
    dtype = at_least_float32(x.dtype)
    rows, columns = (jnp.asarray(_pooling_matrix(side, bins), dtype) for side in x.shape[1:3])
    pooled = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(dtype), precision="highest")
    return pooled.astype(x.dtype)

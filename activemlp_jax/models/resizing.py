"""Maps `[B, H, W, C]` at other sizes, as PyTorch defines them, for the heads of segmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.models.layers import wide


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """`x` `[B, H, W, C]` at `height` by `width`, in its own dtype.

    Centres of pixels lie at halves, the edge goes on outside, and nothing is smoothed on the way
    down.

    Source: `torch.nn.functional.interpolate` with `align_corners=False`.
    """
    if x.shape[1:3] == (height, width):
        return x
    shape = (x.shape[0], height, width, x.shape[3])
    resized = jax.image.resize(x.astype(wide(x.dtype)), shape, "linear", antialias=False)
    return resized.astype(x.dtype)


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """`x` `[B, H, W, C]` at `height` by `width`: the place i of n shows that at floor(i * N / n).

    Source: `torch.nn.functional.interpolate` with `mode='nearest'`, which differs from
    `jax.image.resize` where one size is no multiple of the other.
    """
    for axis, size in ((1, height), (2, width)):
        index = np.arange(size) * x.shape[axis] // size
        x = jnp.take(x, index, axis=axis, unique_indices=False, indices_are_sorted=True)
    return x


@functools.cache
def _pooling_matrix(length: int, bins: int) -> np.ndarray:
    """`[bins, length]`: row i takes the mean of floor(i * N / n) to ceil((i + 1) * N / n) - 1."""
    number = np.arange(bins)
    first, end = number * length // bins, -(-(number + 1) * length // bins)
    place = np.arange(length)
    inside = (place >= first[:, None]) & (place < end[:, None])
    return inside / inside.sum(1, keepdims=True)


def pool_adaptive(x: jax.Array, bins: int) -> jax.Array:
    """Means of `x` `[B, H, W, C]` over a grid of `bins` by `bins` parts, which may overlap.

    Source: `torch.nn.functional.adaptive_avg_pool2d`.
    """
    dtype = wide(x.dtype)
    rows, columns = (jnp.asarray(_pooling_matrix(side, bins), dtype) for side in x.shape[1:3])
    pooled = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(dtype), precision="highest")
    return pooled.astype(x.dtype)

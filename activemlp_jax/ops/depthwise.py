"""Depthwise convolution as shifted multiply-adds, which XLA fuses into one loop.

On a CPU, XLA's grouped convolution is an order of magnitude slower.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolve each channel of `x` `[B, H, W, C]` with its own `kernel` `[k, k, 1, C]`.

    Equals `jax.lax.conv_general_dilated` with `feature_group_count=C`, and takes the arguments that
    `nn.Conv` passes to it. Sums, and returns them, in float32 or wider. Supports stride 1 only.
    """
    del options
    assert tuple(window_strides) == (1, 1), "a depthwise convolution of stride 1"
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (x.shape[i + 1] - kernel.shape[i] + 1 for i in range(2))
    total = jnp.zeros((), dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            shifted = x[:, i : i + rows, j : j + columns].astype(dtype)
            total = total + shifted * kernel[i, j, 0].astype(dtype).reshape(1, 1, 1, -1)
    return total

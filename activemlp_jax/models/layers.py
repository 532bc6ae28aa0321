"""Layers of the network, with the original's initial weights.

`dtype` is that of the computation; parameters are float32, or float64 where `dtype` is.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any

# The original cuts this normal at +-2, a hundred standard deviations out: no cut at all.
linear_init = nn.initializers.normal(stddev=0.02)


def conv_init(groups: int = 1) -> nn.initializers.Initializer:
    """Normal with standard deviation sqrt(2 / fan_out), fan_out = k * k * out / groups."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
        height, width, _, features = shape
        fan_out = height * width * features // groups
        return jax.random.normal(key, shape, dtype) * jnp.asarray(np.sqrt(2 / fan_out), dtype)

    return init


def wide(dtype: Dtype) -> Dtype:
    """float32, or wider where `dtype` is: for parameters, positions, statistics and logits."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(features: int, dtype: Dtype, use_bias: bool = True, name: str | None = None) -> nn.Dense:
    """A linear layer on the last axis."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=wide(dtype),
        kernel_init=linear_init,
        name=name,
    )


def norm(dtype: Dtype, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm over the last axis, epsilon 1e-5."""
    # use_fast_variance would compute E[x^2] - E[x]^2, which cancels.
    return nn.LayerNorm(
        epsilon=1e-5,
        dtype=dtype,
        param_dtype=wide(dtype),
        use_fast_variance=False,
        name=name,
    )


def conv(
    features: int, size: int, stride: int, padding: int, dtype: Dtype, name: str | None = None
) -> nn.Conv:
    """A square convolution with bias; `padding` pixels on every side."""
    return nn.Conv(
        features,
        kernel_size=(size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        param_dtype=wide(dtype),
        kernel_init=conv_init(),
        name=name,
    )


def gelu(x: jax.Array) -> jax.Array:
    """The exact, erf form."""
    return nn.gelu(x, approximate=False)


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel alone, with padding 1: `[B, H, W, C]` to the same.

    Nine shifted multiply-adds, which XLA makes one loop of; its grouped convolution is an order
    of magnitude slower on a CPU. The parameters are those of the convolution.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        sum_dtype = wide(self.dtype)  # as a convolution's sum
        kernel = self.param("kernel", conv_init(groups=channels), (3, 3, 1, channels), sum_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), sum_dtype)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        total = bias.reshape(1, 1, 1, channels)
        for i in range(3):
            for j in range(3):
                shifted = x[:, i : i + height, j : j + width].astype(sum_dtype)
                total = total + shifted * kernel[i, j].reshape(1, 1, 1, channels)
        return total.astype(self.dtype)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear: `[..., C]` to `[..., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = gelu(linear(self.hidden, self.dtype, name="fc1")(x))
        return linear(self.features, self.dtype, name="fc2")(x)

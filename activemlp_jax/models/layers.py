"""Layers that the networks share: those of linen with the original's initialization.

`dtype` is the dtype of a layer's computation and result, `param_dtype` that of its parameters. With
`plain`, a layer uses only ordinary linen and JAX operations. Otherwise it uses faster
implementations of the same functions from `ops`, some with custom VJPs.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.ops.depthwise import conv_by_shifts, plain_conv_by_shifts
from activemlp_jax.ops.gelu import gelu, plain_gelu

Dtype = Any

# The original truncates this normal at +-2, a hundred standard deviations, which has no effect.
dense_init = nn.initializers.normal(stddev=0.02)
# For `k * k` kernels of `features` outputs: standard deviation sqrt(2 / (k * k * features)).
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# The fan-out of one group, here one channel, equals its fan-in.
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def at_least_float32(dtype: Dtype) -> Dtype:
    """Return float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def wide_param_dtype(dtype: Dtype, param_dtype: Dtype | None = None) -> Dtype:
    """Return `param_dtype`, by default float32, or `dtype` if that is wider.

    Raises:
      ValueError: `param_dtype`, also the dtype of offsets and logits, is narrower than float32.
    """
    param_dtype = param_dtype or at_least_float32(dtype)
    if at_least_float32(param_dtype) != param_dtype:
        raise ValueError(f"param_dtype is {jnp.dtype(param_dtype)}, expected float32 or wider")
    return param_dtype


def promote_all_but_bias(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: Dtype
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Cast `x` and `kernel` to `dtype`; flax's layers then add `bias` in its own, wider dtype.

    The gradient of the bias is a sum over all positions. In bfloat16, a sum of a few hundred
    thousand numbers is wrong by half.
    """
    return x.astype(dtype), kernel.astype(dtype), bias


class Dense(nn.Dense):
    """Linear layer, `[.., I]` to `[.., features]`, that adds its bias in `param_dtype`."""

    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = dense_init
    promote_dtype: Any = promote_all_but_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.dtype)


class Conv(nn.Conv):
    """Convolution, `[B, H, W, C]` to `[B, H', W', features]`; adds its bias in `param_dtype`."""

    dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = conv_init
    promote_dtype: Any = promote_all_but_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.dtype)


def depthwise(
    channels: int, dtype: Dtype, param_dtype: Dtype, plain: bool = False, name: str | None = None
) -> Conv:
    """Create a depthwise 3x3 convolution that keeps the size of the map."""
    return Conv(
        channels,
        (3, 3),
        padding=1,
        feature_group_count=channels,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=depthwise_init,
        conv_general_dilated=plain_conv_by_shifts if plain else conv_by_shifts,
        name=name,
    )


# The fast variance, E[x^2] - E[x]^2, suffers from cancellation.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class Mlp(nn.Module):
    """Dense layer, exact GELU, dense layer: `[.., C]` to `[.., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        x = dense(self.hidden, name="fc1")(x)
        x = plain_gelu(x) if self.plain else gelu(x)
        return dense(self.features, name="fc2")(x)

"""Layers that the networks share: linen's own, with the original's initialization.

`dtype` is the dtype of a layer's computation and result, `param_dtype` that of its parameters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.ops.depthwise import conv_by_shifts, plain_conv_by_shifts

Dtype = Any

# The original truncates this normal at +-2, a hundred standard deviations, which has no effect.
dense_init = nn.initializers.normal(stddev=0.02)
# For `k * k` kernels of `features` outputs: standard deviation sqrt(2 / (k * k * features)).
conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# The fan-out of one group, here one channel, equals its fan-in.
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def at_least_float32(dtype: Dtype) -> Dtype:
    """Float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def wide_param_dtype(dtype: Dtype, param_dtype: Dtype | None = None) -> Dtype:
    """Return `param_dtype`, by default float32, or `dtype` if that is wider.

    Raises:
      ValueError: `param_dtype` is narrower than float32; offsets and logits have it, too.
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
    """`nn.Dense`, `[.., I]` to `[.., features]`, that adds its bias in `param_dtype`."""

    kernel_init: nn.initializers.Initializer = dense_init
    promote_dtype: Any = promote_all_but_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.dtype)


class Conv(nn.Conv):
    """`nn.Conv`, `[B, H, W, C]` to `[B, H', W', features]`, that adds its bias in `param_dtype`."""

    kernel_init: nn.initializers.Initializer = conv_init
    promote_dtype: Any = promote_all_but_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x).astype(self.dtype)


def depthwise(
    channels: int, dtype: Dtype, param_dtype: Dtype, impl: str = "auto", name: str | None = None
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
        conv_general_dilated=plain_conv_by_shifts if impl == "definition" else conv_by_shifts,
        name=name,
    )


# The fast variance, E[x^2] - E[x]^2, suffers from cancellation.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


@jax.checkpoint  # Computing erf again costs less than keeping float32 values for the backward pass.
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, computed in float32 or wider, in the dtype of `x`."""
    return nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=False).astype(x.dtype)


class Mlp(nn.Module):
    """Dense layer, exact GELU, dense layer: `[.., C]` to `[.., features]`."""

    hidden: int
    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(self.features, name="fc2")(gelu(dense(self.hidden, name="fc1")(x)))

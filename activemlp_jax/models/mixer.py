"""Layers of the Active Token Mixer: one computes offsets, the other reads and mixes tokens.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.layers import Dense, Dtype, LayerNorm, Mlp, dense_init
from activemlp_jax.ops import folded_mixer
from activemlp_jax.ops.folded_mixer import LinearMap
from activemlp_jax.ops.sample_axis import sample_axis


class OffsetLayer(nn.Module):
    """Computes offsets for both axes, in pixels: `[B, H, W, C]` to `[B, H, W, 2 * C / share_dim]`.

    The first half shifts along the width, the second along the height. The layer computes in
    `param_dtype`, float32 or wider, because bfloat16 numbers near 32 pixels are a quarter pixel
    apart. Its matmul uses the highest precision, because TPUs and GPUs round float32 operands by
    default.
    """

    share_dim: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        x = LayerNorm(**dtypes, name="norm")(x)
        features = 2 * x.shape[-1] // self.share_dim
        return Dense(features, precision=jax.lax.Precision.HIGHEST, **dtypes, name="linear")(x)


class DenseParameters(nn.Module):
    """Makes the parameters of a `Dense` layer for `x` `[.., C]`, C to C, without applying it."""

    param_dtype: Dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> LinearMap:
        shape = (x.shape[-1], x.shape[-1])
        kernel = self.param("kernel", dense_init, shape, self.param_dtype)
        if not self.use_bias:
            return LinearMap(kernel, jnp.zeros_like(kernel[0]))
        return LinearMap(
            kernel, self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
        )


class ActiveTokenMixer(nn.Module):
    """ATM layer: mixes a token from the row, a token from the column and the token itself.

    The call takes `x` `[B, H, W, C]`, normalized, and `offset` `[B, H, W, 2G]` from `OffsetLayer`.
    It returns `[B, H, W, C]`. If the collection 'intermediates' is mutable, the call stores
    `offset` and the mixing weights, `weight` `[B, 1, 1, C, 3]`, in it.

    Mixing weights are computed in `param_dtype` from the mean over all positions. On large maps,
    unless `plain`, the same mix is computed by one matmul per image; see `ops.folded_mixer`.

    Source: Active Token Mixer, section 3.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, offset: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        self.sow("intermediates", "offset", offset)
        offset_w, offset_h = jnp.split(offset, 2, axis=-1)
        impl = "definition" if self.plain else "auto"
        x_w = sample_axis(x, offset_w, "w", impl)
        x_h = sample_axis(x, offset_h, "h", impl)
        wide = self.param_dtype
        fusion = Mlp(channels // 4, 3 * channels, wide, wide, self.plain, name="fusion")

        def weigh(mean: jax.Array) -> jax.Array:
            logits = fusion(mean)
            weight = nn.softmax(logits.reshape(*logits.shape[:-1], channels, 3), axis=-1)
            self.sow("intermediates", "weight", weight)
            return weight

        if not self.plain and folded_mixer.saves_work(height, width, channels):
            parameters = functools.partial(DenseParameters, self.param_dtype)
            layers = [parameters(name=name)(x) for name in ("atm_w", "atm_h")]
            layers.append(parameters(use_bias=False, name="atm_c")(x))
            proj = parameters(name="proj")(x)
            return folded_mixer.mix_tokens((x_w, x_h, x), layers, proj, weigh)

        dense = functools.partial(Dense, channels, dtype=self.dtype, param_dtype=self.param_dtype)
        w, h = dense(name="atm_w")(x_w), dense(name="atm_h")(x_h)
        c = dense(use_bias=False, name="atm_c")(x)
        w, h, c = (token.astype(self.param_dtype) for token in (w, h, c))
        weight = weigh((w + h + c).mean(axis=(1, 2), keepdims=True))
        mixed = w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2]
        return dense(name="proj")(mixed.astype(self.dtype))

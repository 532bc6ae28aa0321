"""Layers of the Active Token Mixer: one computes offsets, the other reads and mixes tokens.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.layers import (
    Affine,
    Dtype,
    LinearParameters,
    Mlp,
    add_bias,
    affine,
    linear,
    norm,
    wide,
)
from activemlp_jax.ops.sample_axis import sample_axis

HAS_BIAS = {"atm_w": True, "atm_h": True, "atm_c": False, "proj": True}


class OffsetLayer(nn.Module):
    """Offsets in pixels for both axes: `[B, H, W, C]` to `[B, H, W, 2 * C / share_dim]`.

    The first half shifts along the width, the second along the height. LayerNorm and linear layer
    compute in float32 or wider even if `dtype` is bfloat16, whose numbers near 32 pixels are a
    quarter pixel apart. The matmul uses the highest precision, because TPUs and GPUs round float32
    operands by default.
    """

    share_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = x.shape[-1] // self.share_dim
        x = norm(wide(self.dtype), name="norm")(x)
        exact = jax.lax.Precision.HIGHEST
        return linear(2 * groups, wide(self.dtype), exact, name="linear")(x)


def _mix_by_one_matmul(
    tokens: Sequence[jax.Array],
    layers: Sequence[Affine],
    proj: Affine,
    weigh: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Compute the mix `[B, H, W, C]` of the tokens by one matmul per image."""
    # Each image uses a layer twice, for means and for tokens, through one copy of the kernel. The
    # devices that share a batch therefore sum one gradient per kernel, not two. Arrays without
    # positions stay float32 or wider until they are multiplied with tokens.
    batch, dtype = tokens[0].shape[0], tokens[0].dtype

    def for_each_image(arrays: Sequence[jax.Array]) -> jax.Array:
        stacked = jnp.stack(arrays)
        return jnp.broadcast_to(stacked[None], (batch, *stacked.shape))

    kernels = for_each_image([kernel for kernel, _ in layers])  # [B, 3, C, C]
    biases = for_each_image(  # [B, 3, C]
        [jnp.zeros_like(kernel[0]) if bias is None else bias for kernel, bias in layers]
    )
    means = jnp.stack([token.mean(axis=(1, 2), dtype=kernels.dtype) for token in tokens], axis=1)
    summary = jnp.einsum("bji,bjio->bo", means, kernels) + biases.sum(axis=1)
    weight = jnp.moveaxis(weigh(summary[:, None, None])[:, 0, 0], -1, 1)  # [B, 3, C]
    maps = affine((kernels * weight[:, :, None]).astype(dtype), (proj[0], None))
    maps = maps.reshape(batch, -1, maps.shape[-1])
    out = jnp.einsum("bhwi,bio->bhwo", jnp.concatenate(tokens, axis=-1), maps)
    return add_bias(out, affine((biases * weight).sum(axis=1)[:, None, None], proj))


class ActiveTokenMixer(nn.Module):
    """ATM layer: mixes three tokens per position, from its row, its column and itself.

    The call takes `x` `[B, H, W, C]`, normalized, and `offset` `[B, H, W, 2G]` from `OffsetLayer`.
    It returns `[B, H, W, C]`. If the collection 'intermediates' is mutable, the call stores
    `offset` and the mixing weights, `weight` `[B, 1, 1, C, 3]`, in it.

    Three linear layers map the tokens. The results are weighted per channel and summed, and a
    fourth linear layer maps the sum. The weights are the same at all positions of an image, because
    they are computed from the mean of the results over all positions, which is also what the layers
    return for the mean of the tokens. So one matrix per image takes its tokens to the output. If
    `x` is large, the layer computes this matrix and multiplies by it, which saves one matmul and
    materializes four arrays fewer.

    Means, mixing weights and sums of tokens are computed in float32 or wider for every `dtype`.

    Source: Active Token Mixer, section 3.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, offset: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        offset_w, offset_h = jnp.split(offset, 2, axis=-1)
        tokens = (sample_axis(x, offset_w, "w"), sample_axis(x, offset_h, "h"), x)
        atm_w, atm_h, atm_c, proj = (
            LinearParameters(channels, use_bias, self.dtype, name=name)(x)
            for name, use_bias in HAS_BIAS.items()
        )
        layers = (atm_w, atm_h, atm_c)

        def weigh(summary: jax.Array) -> jax.Array:
            fusion = Mlp(channels // 4, 3 * channels, wide(self.dtype), name="fusion")(summary)
            weight = nn.softmax(fusion.reshape(*fusion.shape[:-1], channels, 3), axis=-1)
            self.sow("intermediates", "offset", offset)
            self.sow("intermediates", "weight", weight)
            return weight

        # One matrix per image takes 3C^3 multiply-adds to compute and saves C^2 per position.
        if height * width > len(tokens) * channels:
            return _mix_by_one_matmul(tokens, layers, proj, weigh)
        w, h, c = (
            affine(token, layer).astype(wide(self.dtype))
            for token, layer in zip(tokens, layers, strict=True)
        )
        weight = weigh((w + h + c).mean(axis=(1, 2), keepdims=True))
        mixed = w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2]
        return affine(mixed.astype(x.dtype), proj)

"""The Active Token Mixer's layers: which positions to read, and how to mix what is read there.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from activemlp_jax.models.atm import sample_axis
from activemlp_jax.models.layers import (
    Affine,
    Dtype,
    LinearParameters,
    Mlp,
    affine,
    linear,
    norm,
    wide,
)

BIASES = {"atm_w": True, "atm_h": True, "atm_c": False, "proj": True}  # which layers have one


class OffsetLayer(nn.Module):
    """Offsets in pixels for both axes: `[B, H, W, C]` to `[B, H, W, 2 * C / share_dim]`.

    The first half moves along the width, the second along the height. The linear layer runs in
    float32 or wider also under bfloat16, whose spacing at 32 pixels would be a quarter pixel.
    """

    share_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = x.shape[-1] // self.share_dim
        x = norm(wide(self.dtype), name="norm")(x)
        return linear(2 * groups, wide(self.dtype), name="linear")(x)


def _map_at_once(
    tokens: Sequence[jax.Array], layers: Sequence[Affine], weight: jax.Array, proj: Affine
) -> jax.Array:
    """`[B, H, W, C]`: the tokens mapped, weighted, summed and mapped again, by one product."""
    weights = jnp.moveaxis(weight[:, 0, 0], -1, 1)  # [B, 3, C]
    kernels = jnp.stack([kernel for kernel, _ in layers]).astype(weights.dtype)
    biases = jnp.stack([jnp.zeros_like(k[0]) if b is None else b for k, b in layers])
    maps = affine(kernels[None] * weights[:, :, None], (proj[0], None))  # [B, 3, C, C]
    bias = affine((biases[None].astype(weights.dtype) * weights).sum(axis=1), proj)
    read = jnp.concatenate(tokens, axis=-1)
    out = jnp.einsum("bhwi,bio->bhwo", read, maps.reshape(len(maps), -1, maps.shape[-1]))
    return out + bias[:, None, None]


class ActiveTokenMixer(nn.Module):
    """The ATM layer: tokens from the row, from the column and the own one, mixed by content.

    Args of the call: `x` `[B, H, W, C]`, normalised; `offset` `[B, H, W, 2G]` of `OffsetLayer`.
    Returns `[B, H, W, C]`. Where the collection 'intermediates' is mutable, the call leaves
    `offset` and the mixing weights, `weight` `[B, 1, 1, C, 3]`, there.

    The layer maps each of the three tokens linearly, weights the results channel by channel, with
    one weight for all positions of an image, and maps their sum linearly. The weights come from
    the results' mean over all positions, which is what the layers make of the tokens' mean. So an
    image has one linear map from its tokens to the layer's output: on large maps that is the one
    taken, a product less and four maps less to write.

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
            for name, use_bias in BIASES.items()
        )
        layers = (atm_w, atm_h, atm_c)

        means = (token.mean(axis=(1, 2), keepdims=True) for token in tokens)
        w, h, c = map(affine, means, layers)
        fusion = Mlp(channels // 4, 3 * channels, self.dtype, name="fusion")(w + h + c)
        weight = nn.softmax(fusion.reshape(*fusion.shape[:-1], channels, 3), axis=-1)
        self.sow("intermediates", "offset", offset)
        self.sow("intermediates", "weight", weight)

        # The maps cost C^3 multiply-adds each to make, and save C^2 a position.
        if height * width > len(tokens) * channels:
            return _map_at_once(tokens, layers, weight, proj)
        w, h, c = map(affine, tokens, layers)
        mixed = w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2]
        return affine(mixed, proj)

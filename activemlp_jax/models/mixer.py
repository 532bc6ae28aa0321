"""The Active Token Mixer's layers: which positions to read, and how to mix what is read there.

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

BIASES = {"atm_w": True, "atm_h": True, "atm_c": False, "proj": True}  # which layers have one


class OffsetLayer(nn.Module):
    """Offsets in pixels for both axes: `[B, H, W, C]` to `[B, H, W, 2 * C / share_dim]`.

    The first half moves along the width, the second along the height. Norm and linear layer run in
    float32 or wider also under bfloat16, whose spacing at 32 pixels would be a quarter pixel. So
    the products ask for the highest precision: by default TPUs and GPUs round float32 factors.
    """

    share_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = x.shape[-1] // self.share_dim
        x = norm(wide(self.dtype), name="norm")(x)
        exact = jax.lax.Precision.HIGHEST
        return linear(2 * groups, wide(self.dtype), exact, name="linear")(x)


def _map_at_once(
    tokens: Sequence[jax.Array],
    layers: Sequence[Affine],
    proj: Affine,
    weigh: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`[B, H, W, C]`: the tokens mapped, weighted, summed and mapped again, by one product.

    All that an image does to a layer meets in one matrix of its own, so that devices which share
    a batch sum one gradient for each of the layers' kernels. What has no positions is float32 or
    wider until it is multiplied with a map.
    """
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
    """The ATM layer: tokens from the row, from the column and the own one, mixed by content.

    Args of the call: `x` `[B, H, W, C]`, normalised; `offset` `[B, H, W, 2G]` of `OffsetLayer`.
    Returns `[B, H, W, C]`. Where the collection 'intermediates' is mutable, the call leaves
    `offset` and the mixing weights, `weight` `[B, 1, 1, C, 3]`, there.

    The layer maps each of the three tokens linearly, weights the results channel by channel, with
    one weight for all positions of an image, and maps their sum linearly. The weights come from
    the results' mean over all positions, which is what the layers make of the tokens' mean. So an
    image has one linear map from its tokens to the layer's output: on large maps that is the one
    taken, a product less and four maps less to write.

    Means, mixing weights and sums of tokens are computed in float32 or wider, whatever `dtype`.

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

        def weigh(summary: jax.Array) -> jax.Array:
            fusion = Mlp(channels // 4, 3 * channels, wide(self.dtype), name="fusion")(summary)
            weight = nn.softmax(fusion.reshape(*fusion.shape[:-1], channels, 3), axis=-1)
            self.sow("intermediates", "offset", offset)
            self.sow("intermediates", "weight", weight)
            return weight

        # The maps cost C^3 multiply-adds each to make, and save C^2 a position.
        if height * width > len(tokens) * channels:
            return _map_at_once(tokens, layers, proj, weigh)
        w, h, c = (
            affine(token, layer).astype(wide(self.dtype))
            for token, layer in zip(tokens, layers, strict=True)
        )
        weight = weigh((w + h + c).mean(axis=(1, 2), keepdims=True))
        mixed = w * weight[..., 0] + h * weight[..., 1] + c * weight[..., 2]
        return affine(mixed.astype(x.dtype), proj)

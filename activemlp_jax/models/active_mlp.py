"""ActiveMLP, a backbone of Active Token Mixers, and its five published variants.

Source: "Active Token Mixer" (AAAI 2023, arXiv 2203.06108), section 3. The numbers of the variants
are from the authors' release.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.models.layers import (
    Conv,
    Dense,
    Dtype,
    LayerNorm,
    Mlp,
    depthwise,
    wide_param_dtype,
)
from activemlp_jax.models.mixer import ActiveTokenMixer, OffsetLayer
from activemlp_jax.ops.image_conv import conv_image
from activemlp_jax.ops.remat import recompute

MIN_IMAGE_SIDE = 32  # pixels; the total stride of the four stages


class Block(nn.Module):
    """Residual block: ATM, then MLP, each with a LayerNorm before it and drop path after it.

    With `makes_offset`, the block computes offsets from its input; otherwise it uses the offsets
    passed to it. Either way it returns the offsets, for the blocks after it. With `remat`, the
    backward pass recomputes each half from its input.
    """

    dim: int
    mlp_ratio: float
    share_dim: int
    makes_offset: bool
    drop_path_rate: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False
    plain: bool = False

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.makes_offset:
            self.offset_layer = OffsetLayer(self.share_dim, self.param_dtype)
        self.norm1 = LayerNorm(**dtypes)
        self.atm = ActiveTokenMixer(**dtypes, plain=self.plain)
        self.norm2 = LayerNorm(**dtypes)
        self.mlp = Mlp(int(self.dim * self.mlp_ratio), self.dim, **dtypes, plain=self.plain)
        # Dropout with one draw per sample is drop path, scaled by 1 / keep. Its draws depend on its
        # name, which must not change, so that runs of earlier versions resume with the same draws.
        self.drop_path = nn.Dropout(self.drop_path_rate, broadcast_dims=(1, 2, 3), name="Dropout_0")

    def mix_tokens(self, x: jax.Array, offset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        if self.makes_offset:
            offset = self.offset_layer(x)
        assert offset is not None, "the first block of a stage makes offsets"
        return self.atm(self.norm1(x), offset), offset

    def mix_channels(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.norm2(x))

    def __call__(
        self, x: jax.Array, offset: jax.Array | None, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        mix_tokens, mix_channels = Block.mix_tokens, Block.mix_channels
        if self.remat:
            mix_tokens, mix_channels = recompute(mix_tokens), recompute(mix_channels)
        mixed, offset = mix_tokens(self, x, offset)
        x = x + self.drop_path(mixed, deterministic=not train)
        return x + self.drop_path(mix_channels(self, x), deterministic=not train), offset


class Stage(nn.Module):
    """Blocks of one width and resolution.

    `drop_path_rates` has one rate per block. Block j computes new offsets if `offset_interval`
    divides j and j is not the last block. Just before such a block, the stage adds a positional
    encoding (PEG): a depthwise convolution of the map, with the same parameters each time. With
    `remat`, the backward pass recomputes the halves of each block.
    """

    dim: int
    mlp_ratio: float
    share_dim: int
    offset_interval: int
    drop_path_rates: Sequence[float]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False
    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        depth = len(self.drop_path_rates)
        peg = depthwise(self.dim, self.dtype, self.param_dtype, self.plain, name="peg")
        offset = None
        for j, rate in enumerate(self.drop_path_rates):
            makes_offset = j % self.offset_interval == 0 and j != depth - 1
            if makes_offset:
                x = x + peg(x)
            block = Block(
                self.dim,
                self.mlp_ratio,
                self.share_dim,
                makes_offset=makes_offset,
                drop_path_rate=rate,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                remat=self.remat,
                plain=self.plain,
                name=f"block_{j}",
            )
            x, offset = block(x, offset, train)
        return x


def check_architecture(
    depths: Sequence[int],
    embed_dims: Sequence[int],
    mlp_ratios: Sequence[float],
    share_dims: Sequence[int],
    offset_interval: int,
    num_classes: int,
    drop_path_rate: float,
    remat_stages: Sequence[int] = (),
) -> None:
    """Check the fields of an `ActiveMLP`; raise a ValueError that names an invalid one."""
    fields = {
        "depths": depths,
        "embed_dims": embed_dims,
        "mlp_ratios": mlp_ratios,
        "share_dims": share_dims,
    }
    for name, values in fields.items():
        if len(values) != 4:
            raise ValueError(f"{name} is {tuple(values)}, expected four values, one per stage")
        kinds = (int, float) if name == "mlp_ratios" else (int,)
        if not all(type(value) in kinds and 0 < value < float("inf") for value in values):
            kind = "numbers" if name == "mlp_ratios" else "integers"
            raise ValueError(f"{name} is {tuple(values)}, expected positive {kind}")
    for stage, depth in enumerate(depths):
        if depth < 2:
            raise ValueError(
                f"depths is {tuple(depths)}: stage {stage} has {depth} block, expected at least "
                "2 (the last block of a stage makes no offsets of its own)"
            )
    for stage, (dim, share) in enumerate(zip(embed_dims, share_dims, strict=True)):
        if dim % share:
            raise ValueError(
                f"embed_dims is {tuple(embed_dims)}: the {dim} channels of stage {stage} are not "
                f"divisible by its share_dims value {share}"
            )
    for stage, (dim, ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
        if dim < 4:
            raise ValueError(f"embed_dims is {tuple(embed_dims)}: stage {stage} needs at least 4")
        if int(dim * ratio) < 1:
            raise ValueError(
                f"mlp_ratios is {tuple(mlp_ratios)}: stage {stage} of {dim} channels would have no "
                "hidden channels"
            )
    if offset_interval < 1:
        raise ValueError(f"offset_interval is {offset_interval}, expected at least 1")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 <= rate < 1")
    if not set(remat_stages) <= {0, 1, 2, 3}:
        raise ValueError(f"remat_stages is {tuple(remat_stages)}, expected stages from 0 to 3")


class ActiveMLP(nn.Module):
    """ActiveMLP of any configuration; the first four fields have one value per stage.

    Args:
      depths: number of blocks, at least two.
      embed_dims: number of channels.
      mlp_ratios: hidden channels of the MLPs, divided by `embed_dims`.
      share_dims: number of adjacent channels that share one offset; divides `embed_dims`.
      offset_interval: interval, in blocks, at which a stage computes new offsets.
      num_classes: number of outputs of the linear head.
      drop_path_rate: rate of the last block; rates grow linearly from 0 at the first block.
      dtype: dtype of the computation.
      remat_stages: indices, 0 to 3, of the stages whose blocks the backward pass recomputes. This
        takes less memory and more time; results stay the same.
      param_dtype: dtype of the parameters, offsets, mixing weights and logits, and of sums over
        positions or images in both passes; None for float32, or `dtype` if that is wider.
      plain: whether to use only ordinary linen and JAX operations. By default the model uses faster
        implementations of the same functions, whose custom VJPs support only first derivatives in
        reverse mode. With `plain` and no `remat_stages`, `jax.jvp`, `jax.hessian` and the like
        work.

    Calls:
      `init(rng, images)` returns variables. `apply(variables, images, train=False)` returns logits
      `[B, num_classes]`, and `apply(variables, images, method='features')` the four maps of
      `features`. Images are `[B, H, W, 3]`, floating, normalized, H and W at least 32. With
      `train=True` and a positive drop path rate, `apply` needs `rngs={'dropout': key}`.

    Raises:
      ValueError: a field is invalid, or images have the wrong shape.

    Source: Active Token Mixer, section 3.
    """

    depths: Sequence[int]
    embed_dims: Sequence[int]
    mlp_ratios: Sequence[float]
    share_dims: Sequence[int]
    offset_interval: int
    num_classes: int = 1000
    drop_path_rate: float = 0.0
    dtype: Dtype = jnp.float32
    remat_stages: Sequence[int] = ()
    param_dtype: Dtype | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        check_architecture(
            self.depths,
            self.embed_dims,
            self.mlp_ratios,
            self.share_dims,
            self.offset_interval,
            self.num_classes,
            self.drop_path_rate,
            self.remat_stages,
        )
        # Tuples make a model hashable, so that it can be a static argument of `jit`.
        for name in ("depths", "embed_dims", "mlp_ratios", "share_dims", "remat_stages"):
            setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def setup(self) -> None:
        param_dtype = wide_param_dtype(self.dtype, self.param_dtype)
        dtypes = {"dtype": self.dtype, "param_dtype": param_dtype}
        # The original pads by 2, which differs from 'SAME'.
        convolve = None if self.plain else conv_image
        self.stem = Conv(self.embed_dims[0], (7, 7), 4, 2, **dtypes, conv_general_dilated=convolve)
        rates = np.linspace(0, self.drop_path_rate, sum(self.depths))
        ends = np.cumsum(self.depths)
        self.stages = [
            Stage(
                self.embed_dims[i],
                self.mlp_ratios[i],
                self.share_dims[i],
                self.offset_interval,
                tuple(float(rate) for rate in rates[ends[i] - self.depths[i] : ends[i]]),
                **dtypes,
                remat=i in self.remat_stages,
                plain=self.plain,
            )
            for i in range(4)
        ]
        self.downsamples = [Conv(dim, (3, 3), 2, 1, **dtypes) for dim in self.embed_dims[1:]]
        self.norm = LayerNorm(**dtypes)
        self.head = Dense(self.num_classes, dtype=param_dtype, param_dtype=param_dtype)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Compute the output of each stage, before downsampling and without normalization.

        Args:
          images: `[B, H, W, 3]`, floating, normalized; H and W at least 32.
          train: whether drop path is on.

        Returns:
          Four maps `[B, H / s, W / s, embed_dims[i]]` for strides s of 4, 8, 16 and 32, in the
          model's dtype. Sides that a stride does not divide follow the convolutions' floor
          arithmetic.

        Raises:
          ValueError: images have another rank or number of channels, or a side below 32.

        Source: Active Token Mixer, section 3; the maps that the original's dense tasks use.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            is_nchw = images.ndim == 4 and images.shape[1] == 3
            hint = "; channels come last: images.transpose(0, 2, 3, 1)" if is_nchw else ""
            raise ValueError(f"images have shape {images.shape}, expected [B, H, W, 3]{hint}")
        if min(images.shape[1:3]) < MIN_IMAGE_SIDE:
            raise ValueError(
                f"images have shape {images.shape}, expected sides of at least {MIN_IMAGE_SIDE}"
            )
        x = self.stem(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x, train)
            maps.append(x)
            if i < 3:
                x = self.downsamples[i](x)
        return maps

    def pooled_features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Compute the head's input: the normalized last map, averaged over positions, `[B, C]`."""
        x = self.norm(self.features(images, train)[-1])
        return x.mean(axis=(1, 2), dtype=self.head.param_dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return self.head(self.pooled_features(images, train))


VARIANTS: dict[str, dict[str, Any]] = {
    "active_xtiny": {
        "depths": (2, 2, 4, 2),
        "embed_dims": (64, 128, 320, 512),
        "mlp_ratios": (4, 4, 4, 4),
        "share_dims": (2, 4, 4, 8),
        "offset_interval": 2,
    },
    "active_tiny": {
        "depths": (2, 3, 10, 3),
        "embed_dims": (64, 128, 320, 512),
        "mlp_ratios": (4, 4, 4, 4),
        "share_dims": (2, 4, 4, 8),
        "offset_interval": 2,
    },
    "active_small": {
        "depths": (3, 4, 18, 3),
        "embed_dims": (64, 128, 320, 512),
        "mlp_ratios": (8, 8, 4, 4),
        "share_dims": (2, 4, 4, 8),
        "offset_interval": 6,
    },
    "active_base": {
        "depths": (3, 8, 27, 3),
        "embed_dims": (64, 128, 320, 512),
        "mlp_ratios": (8, 8, 4, 4),
        "share_dims": (2, 4, 4, 8),
        "offset_interval": 6,
    },
    "active_large": {
        "depths": (3, 4, 24, 3),
        "embed_dims": (96, 192, 384, 768),
        "mlp_ratios": (4, 4, 4, 4),
        "share_dims": (2, 4, 4, 8),
        "offset_interval": 6,
    },
}


def list_models() -> list[str]:
    """List the names that `create_model` accepts.

    Returns:
      The names of the five variants, such as 'active_tiny', in alphabetical order.
    """
    return sorted(VARIANTS)


def create_model(
    name: str, num_classes: int = 1000, drop_path_rate: float = 0.0, dtype: Dtype = jnp.float32
) -> ActiveMLP:
    """Create a published variant as a linen module without weights.

    Args:
      name: one of `list_models()`.
      num_classes: number of outputs of the head.
      drop_path_rate: rate of the last block; rates grow linearly from 0 at the first block.
      dtype: dtype of the computation; see `ActiveMLP`.

    Returns:
      An `ActiveMLP` with the fields of the variant; its `init` creates variables.

    Raises:
      ValueError: `name` is unknown, `num_classes` is below 1, or `drop_path_rate` is not in [0, 1).

    Source: the authors' release; Active Token Mixer, section 4.
    """
    if name not in VARIANTS:
        raise ValueError(f"no model {name!r}, expected one of {', '.join(list_models())}")
    return ActiveMLP(
        **VARIANTS[name], num_classes=num_classes, drop_path_rate=drop_path_rate, dtype=dtype
    )

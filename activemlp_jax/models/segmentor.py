"""Semantic segmentation models: the backbone with a head that classifies every pixel.

Source: the ADE20K experiments of the authors' release; Active Token Mixer, section 4.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from activemlp_jax.models.active_mlp import VARIANTS, ActiveMLP, list_models
from activemlp_jax.models.heads import FcnHead, FpnHead, FpnNeck, UperNetHead
from activemlp_jax.models.layers import Dtype, LayerNorm, wide_param_dtype

HEADS = {"upernet": 512, "fpn": 128}  # default width of each head
AUXILIARY_MAP = 2  # index of the map that the auxiliary head reads
BACKBONE_FIELDS = (
    *("depths", "embed_dims", "mlp_ratios", "share_dims"),
    *("offset_interval", "drop_path_rate", "remat_stages", "plain"),
)


class ActiveSegmentor(nn.Module):
    """ActiveMLP with a head that computes class scores for each pixel of its largest map.

    Args:
      backbone: fields of `ActiveMLP` by name. `num_classes` is ignored; `dtype` is the default of
        `dtype` below.
      head: 'upernet', with an auxiliary head for training, or 'fpn' (Semantic FPN).
      num_classes: number of classes of the labels.
      channels: width of the head; None for the original's, 512 for 'upernet' and 128 for 'fpn'.
      aux_channels: width of the auxiliary head.
      neck_channels: width of the feature pyramid of 'fpn'.
      dropout_rate: rate of the dropout of whole channels before each classifier.
      dtype: dtype of the computation; None for the backbone's.
      param_dtype: dtype of the parameters, offsets, statistics and logits; None for the backbone's,
        which is float32 by default, or `dtype` if that is wider.

    Calls:
      `init(rng, images)` returns `params` and `batch_stats`. `apply(variables, images)` returns
      logits `[B, H / 4, W / 4, num_classes]`; sides that 4 does not divide follow the
      convolutions' floor arithmetic. With `return_aux=True` it also returns the logits of the
      auxiliary head, at 1 / 16 of the image's size. `apply(variables, images, method='features')`
      returns the four normalized maps. Images are `[B, H, W, 3]`, floating, normalized, H and W at
      least 32. With `train=True`, batch norm uses the statistics of the batch, and `apply` needs
      `rngs={'dropout': key}`; to update the running statistics, pass `mutable=['batch_stats']`.

    Raises:
      ValueError: a field is invalid, images have the wrong shape, or `return_aux` is True for an
        'fpn'.

    Source: the segmentation of the authors' release; Active Token Mixer, section 4.
    """

    backbone: Mapping[str, Any]
    head: str = "upernet"
    num_classes: int = 150
    channels: int | None = None
    aux_channels: int = 256
    neck_channels: int = 256
    dropout_rate: float = 0.1
    dtype: Dtype | None = None
    param_dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}, expected one of {', '.join(HEADS)}")
        if self.channels is None:
            self.channels = HEADS[self.head]
        for name in ("num_classes", "channels", "aux_channels", "neck_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate is {self.dropout_rate}, expected 0 <= rate < 1")
        if self.dtype is None:
            self.dtype = self.backbone.get("dtype", jnp.float32)
        if self.param_dtype is None:
            self.param_dtype = self.backbone.get("param_dtype")
        # Raises if a field is invalid, and fills in defaults, so that equal models compare equal.
        backbone = ActiveMLP(**{**self.backbone, "num_classes": 1, "dtype": self.dtype})
        self.backbone = FrozenDict({name: getattr(backbone, name) for name in BACKBONE_FIELDS})
        super().__post_init__()

    def setup(self) -> None:
        param_dtype = wide_param_dtype(self.dtype, self.param_dtype)
        dtypes = {"dtype": self.dtype, "param_dtype": param_dtype}
        self.active_mlp = ActiveMLP(**self.backbone, **dtypes)
        self.norms = [LayerNorm(**dtypes) for _ in range(4)]
        rest = self.dropout_rate, self.dtype, param_dtype
        channels = self.channels or HEADS[self.head]
        self.decode_head: nn.Module
        if self.head == "upernet":
            self.decode_head = UperNetHead(self.num_classes, channels, *rest)
            self.auxiliary_head = FcnHead(self.num_classes, self.aux_channels, *rest)
        else:
            self.neck = FpnNeck(self.neck_channels, **dtypes)
            self.decode_head = FpnHead(self.num_classes, channels, *rest)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Compute the maps that the head reads: the backbone's maps, each after a LayerNorm.

        Args:
          images: `[B, H, W, 3]`, floating, normalized; H and W at least 32.
          train: whether drop path is on.

        Returns:
          Four maps `[B, H / s, W / s, embed_dims[i]]` for strides s of 4, 8, 16 and 32, in the
          model's dtype. Sides that a stride does not divide follow the convolutions' floor
          arithmetic.

        Raises:
          ValueError: images have another rank or number of channels, or a side below 32.

        Source: the segmentation of the authors' release, which has a separate norm for each map.
        """
        maps = self.active_mlp.features(images, train)
        return [layer_norm(x) for layer_norm, x in zip(self.norms, maps, strict=True)]

    def __call__(
        self, images: jax.Array, train: bool = False, return_aux: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        maps = self.features(images, train)
        if self.head == "fpn":
            if return_aux:
                raise ValueError("return_aux is True, but head 'fpn' has no auxiliary head")
            return self.decode_head(self.neck(maps), train)
        logits = self.decode_head(maps, train)
        if return_aux or self.is_initializing():
            auxiliary = self.auxiliary_head(maps[AUXILIARY_MAP], train)
            return (logits, auxiliary) if return_aux else logits
        return logits


def create_segmentor(
    backbone: str,
    head: str = "upernet",
    num_classes: int = 150,
    drop_path_rate: float = 0.0,
    dtype: Dtype = jnp.float32,
) -> ActiveSegmentor:
    """Create a published variant with a segmentation head, as a linen module without weights.

    Args:
      backbone: one of `list_models()`.
      head: 'upernet' or 'fpn'.
      num_classes: number of classes of the labels; ADE20K has 150.
      drop_path_rate: rate of the backbone's last block; the original trains active_large with 0.2.
      dtype: dtype of the computation; see `ActiveSegmentor`.

    Returns:
      An `ActiveSegmentor` with the variant as backbone and the original's widths of the head; its
      `init` creates variables.

    Raises:
      ValueError: `backbone` or `head` is unknown, `num_classes` is below 1, or `drop_path_rate` is
        not in [0, 1).

    Source: the authors' release; Active Token Mixer, section 4.
    """
    if backbone not in VARIANTS:
        raise ValueError(f"no backbone {backbone!r}, expected one of {', '.join(list_models())}")
    fields = {**VARIANTS[backbone], "drop_path_rate": drop_path_rate}
    return ActiveSegmentor(fields, head, num_classes, dtype=dtype)


Model = ActiveMLP | ActiveSegmentor


def backbone(model: Model) -> ActiveMLP:
    """Return the backbone of `model`: a classifier itself, or the ActiveMLP of a segmentor."""
    return ActiveMLP(**model.backbone) if isinstance(model, ActiveSegmentor) else model


def variant_name(model: Model) -> str | None:
    """Return the name of the backbone's published variant, or None; `num_classes` is ignored."""
    network = backbone(model)
    for name, fields in VARIANTS.items():
        if all(getattr(network, field) == value for field, value in fields.items()):
            return name
    return None

"""The segmentation models in PyTorch, as independent references to check the flax models against.

Their state dicts have the keys and shapes of the authors' mmsegmentation checkpoints. They share no
code with the flax models and are for inference only. They need the optional dependencies [torch].

Source: Active Token Mixer, section 4; UperNet and Semantic FPN of mmsegmentation 0.11; the keys of
the authors' checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from activemlp_jax.torch_reference.active_mlp import TorchBackbone

# Maps in this file are `[B, C, H, W]`.


def _resize_to(x: Tensor, target: Tensor) -> Tensor:
    """Resize `x` bilinearly to the height and width of `target`."""
    return functional.interpolate(x, target.shape[2:], mode="bilinear", align_corners=False)


class ConvModule(nn.Module):
    """A convolution that keeps the size, with batch norm and ReLU; if `plain`, with just a bias."""

    def __init__(self, features: int, out: int, size: int, plain: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(features, out, size, padding=size // 2, bias=plain)
        self.bn = None if plain else nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, features, H, W]` to `[B, out, H, W]`."""
        x = self.conv(x)
        return x if self.bn is None else self.bn(x).relu()


class SegmentationBackbone(TorchBackbone):
    """The backbone for segmentation, with a layer norm for each stage and no head."""

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        for i, dim in enumerate(fields["embed_dims"]):
            self.add_module(f"norm_{i}", nn.LayerNorm(dim))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images `[B, H, W, 3]` to four maps `[B, C, H / s, W / s]`, s = 4, 8, 16 and 32."""
        maps = self.stage_maps(images)
        return [self.get_submodule(f"norm_{i}")(x).movedim(3, 1) for i, x in enumerate(maps)]


class UperNet(nn.Module):
    """UperNet's head: pyramid pooling of the last map, then a feature pyramid of all four maps."""

    def __init__(self, dims: list[int], channels: int, num_classes: int):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvModule(dims[3], channels, 1))
            for bins in (1, 2, 3, 6)
        )
        self.bottleneck = ConvModule(dims[3] + 4 * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for dim in dims[:3])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map the four stage maps to logits at the resolution of the first."""
        last = maps[3]
        context = [last, *(_resize_to(pool(last), last) for pool in self.psp_modules)]
        x = self.bottleneck(torch.cat(context, dim=1))
        pyramid = [x]
        for i in (2, 1, 0):
            x = self.lateral_convs[i](maps[i]) + _resize_to(x, maps[i])
            pyramid.insert(0, self.fpn_convs[i](x))
        fused = torch.cat([_resize_to(level, maps[0]) for level in pyramid], dim=1)
        return self.conv_seg(self.fpn_bottleneck(fused))


class Fcn(nn.Module):
    """UperNet's auxiliary head, a small fully convolutional network."""

    def __init__(self, dim: int, channels: int, num_classes: int):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.convs = nn.Sequential(ConvModule(dim, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map a stage map to logits at its resolution."""
        return self.conv_seg(self.convs(x))


class Neck(nn.Module):
    """Semantic FPN's neck: a feature pyramid with equal channels at all levels and no norms."""

    def __init__(self, dims: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1, plain=True) for dim in dims)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, plain=True) for _ in dims)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map the four stage maps to four maps of the same sizes with `channels` channels."""
        pyramid: list[Tensor] = []
        coarser: Tensor | None = None
        for i in (3, 2, 1, 0):
            x = self.lateral_convs[i](maps[i])
            if coarser is not None:
                x = x + functional.interpolate(coarser, x.shape[2:], mode="nearest")
            coarser = x
            pyramid.insert(0, self.fpn_convs[i](x))
        return pyramid


class SemanticFpn(nn.Module):
    """Semantic FPN's head: upsamples each map to the size of the first, and sums them."""

    def __init__(self, dim: int, channels: int, num_classes: int):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.scale_heads = nn.ModuleList()
        for doublings in range(4):
            steps: list[nn.Module] = []
            for step in range(max(doublings, 1)):
                steps.append(ConvModule(channels if step else dim, channels, 3))
                if doublings:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*steps))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map the neck's four maps to logits at the resolution of the first."""
        scaled = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        return self.conv_seg(sum(_resize_to(x, maps[0]) for x in scaled))


class TorchSegmentor(nn.Module):
    """ActiveMLP with a segmentation head; takes the fields of the flax `ActiveSegmentor`."""

    def __init__(
        self,
        backbone: Mapping[str, Any],
        head: str,
        num_classes: int,
        channels: int,
        aux_channels: int = 256,
        neck_channels: int = 256,
    ):
        super().__init__()
        dims = list(backbone["embed_dims"])
        self.backbone = SegmentationBackbone(**backbone)
        self.neck: nn.Module | None = None
        self.auxiliary_head: nn.Module | None = None
        if head == "fpn":
            self.neck = Neck(dims, neck_channels)
            self.decode_head: nn.Module = SemanticFpn(neck_channels, channels, num_classes)
        else:
            self.decode_head = UperNet(dims, channels, num_classes)
            self.auxiliary_head = Fcn(dims[2], aux_channels, num_classes)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute logits, in evaluation mode.

        Args:
          images: `[B, H, W, 3]`, normalized.

        Returns:
          The head's logits, `[B, H / 4, W / 4, num_classes]`. UperNet adds the logits of the
          auxiliary head, `[B, H / 16, W / 16, num_classes]`.
        """
        maps = self.backbone(images)
        logits = [self.decode_head(maps if self.neck is None else self.neck(maps))]
        if self.auxiliary_head is not None:
            logits.append(self.auxiliary_head(maps[2]))
        return tuple(x.movedim(1, 3) for x in logits)

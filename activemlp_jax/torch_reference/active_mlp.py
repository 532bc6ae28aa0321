"""ActiveMLP in PyTorch, an independent implementation to check the flax model against.

Its state dict has the keys and shapes of the authors' releases. It shares no code with the flax
model, so a mistake goes unnoticed only if both implementations make it. It has no drop path, so use
it for inference and gradients, not for training. Needs the optional dependencies [torch].

Source: Active Token Mixer, section 3, and the keys of the authors' released checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def sample_axis(x: Tensor, offset: Tensor, dim: int) -> Tensor:
    """Interpolate `x` linearly along `dim` at shifted positions, with zeros outside the map.

    Args:
      x: `[B, H, W, C]`.
      offset: `[B, H, W, G]`, finite, in pixels; group g shifts the channels from `g*C/G` to
        `(g+1)*C/G - 1`.
      dim: 1 for the height, 2 for the width.

    Returns:
      `[B, H, W, C]`.
    """
    length = x.shape[dim]
    index = torch.arange(length, dtype=offset.dtype, device=x.device)
    position = index.view([-1 if d == dim else 1 for d in range(4)]) + offset
    position = position.repeat_interleave(x.shape[-1] // offset.shape[-1], dim=-1)
    floor = position.floor()
    result = torch.zeros_like(x)
    for neighbor, weight in ((floor, 1 - (position - floor)), (floor + 1, position - floor)):
        inside = (neighbor >= 0) & (neighbor < length)
        value = x.gather(dim, neighbor.clamp(0, length - 1).long())
        result = result + weight * torch.where(inside, value, 0)
    return result


class Mlp(nn.Module):
    """A two-layer MLP with exact GELU."""

    def __init__(self, features: int, hidden: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., features]` to `[..., out]`."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Convolution(nn.Module):
    """A convolution of NHWC maps; its parameters are named `proj.*`."""

    def __init__(
        self, features: int, out: int, size: int, stride: int = 1, padding: int = 0, groups: int = 1
    ):
        super().__init__()
        self.proj = nn.Conv2d(features, out, size, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, H, W, features]` to `[B, H', W', out]`."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ActiveTokenMixer(nn.Module):
    """The Active Token Mixer (ATM)."""

    def __init__(self, dim: int):
        super().__init__()
        self.atm_c = nn.Linear(dim, dim, bias=False)
        self.atm_h = nn.Conv2d(dim, dim, 1)
        self.atm_w = nn.Conv2d(dim, dim, 1)
        self.fusion = Mlp(dim, dim // 4, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Map `x` `[B, H, W, C]` and `offset` `[B, H, W, 2G]` to `[B, H, W, C]`."""
        offset_w, offset_h = offset.chunk(2, dim=-1)
        sampled = (sample_axis(x, offset_w, 2), sample_axis(x, offset_h, 1))
        w, h = (
            functional.linear(tokens, conv.weight[:, :, 0, 0], conv.bias)
            for tokens, conv in zip(sampled, (self.atm_w, self.atm_h), strict=True)
        )
        c = self.atm_c(x)
        fusion = self.fusion((w + h + c).mean(dim=(1, 2)))
        weight = fusion.view(-1, 1, 1, x.shape[-1], 3).softmax(dim=-1)
        return self.proj((torch.stack((w, h, c), dim=-1) * weight).sum(dim=-1))


class Block(nn.Module):
    """An ATM and an MLP; some blocks also hold an offset layer or a downsampling layer."""

    def __init__(self, dim: int, hidden: int, offsets: int, downsampled_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.atm = ActiveTokenMixer(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dim)
        self.offset_layer: nn.Module | None = None
        if offsets:
            self.offset_layer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, offsets))
        self.downsample: nn.Module | None = None
        if downsampled_dim:
            self.downsample = Convolution(dim, downsampled_dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Apply the ATM and the MLP; `x` and the result are `[B, H, W, C]`."""
        x = x + self.atm(self.norm1(x), offset)
        return x + self.mlp(self.norm2(x))


class TorchBackbone(nn.Module):
    """ActiveMLP without its head; takes the architecture fields of the flax `ActiveMLP`."""

    def __init__(
        self,
        depths: Sequence[int],
        embed_dims: Sequence[int],
        mlp_ratios: Sequence[float],
        share_dims: Sequence[int],
        offset_interval: int,
    ):
        super().__init__()
        self.patch_embed = Convolution(3, embed_dims[0], 7, stride=4, padding=2)
        self.pos_blocks = nn.ModuleList(
            Convolution(dim, dim, 3, padding=1, groups=dim) for dim in embed_dims
        )
        self.blocks = nn.ModuleList()
        for stage, depth in enumerate(depths):
            dim = embed_dims[stage]
            blocks = nn.ModuleList()
            for j in range(depth):
                is_last = j == depth - 1
                makes_offset = j % offset_interval == 0 and not is_last
                blocks.append(
                    Block(
                        dim,
                        hidden=int(dim * mlp_ratios[stage]),
                        offsets=2 * dim // share_dims[stage] if makes_offset else 0,
                        downsampled_dim=embed_dims[stage + 1] if is_last and stage < 3 else 0,
                    )
                )
            self.blocks.append(blocks)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Compute the output map of each stage, before downsampling.

        Args:
          images: `[B, H, W, 3]`, normalized.

        Returns:
          Four maps, `[B, H / s, W / s, embed_dims[i]]` for the strides s = 4, 8, 16 and 32.
        """
        x = self.patch_embed(images)
        maps = []
        for stage, peg in enumerate(self.pos_blocks):
            for block in self.blocks[stage].children():
                assert isinstance(block, Block)
                if block.offset_layer is not None:
                    x = x + peg(x)
                    offset = block.offset_layer(x)
                x = block(x, offset)
                downsample = block.downsample
            maps.append(x)
            if downsample is not None:  # from the stage's last block
                x = downsample(x)
        return maps


class TorchActiveMLP(TorchBackbone):
    """ActiveMLP with its head; takes the architecture fields of the flax `ActiveMLP`."""

    def __init__(self, *, embed_dims: Sequence[int], num_classes: int = 1000, **fields: Any):
        super().__init__(embed_dims=embed_dims, **fields)
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images `[B, H, W, 3]` to logits `[B, num_classes]`."""
        return self.head(self.norm(self.stage_maps(images)[-1]).mean(dim=(1, 2)))

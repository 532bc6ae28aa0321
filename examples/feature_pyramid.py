"""A detector's parts on the backbone: a feature pyramid, and a head that all its levels share.

    python examples/feature_pyramid.py

The backbone gives maps at strides 4, 8, 16 and 32, not normalised. The last three become levels P3
to P5 of one width, each with what the coarser ones know; P6 and P7 follow from P5. The head gives
each place of each level class scores, and a box around the place. What is missing of a detector are
its loss, its data and the suppression of double boxes.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017); boxes by distances
as in Tian et al., "FCOS" (ICCV 2019).
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import activemlp_jax as am

STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7, in pixels


class FeaturePyramid(nn.Module):
    """Levels of one width out of the backbone's maps."""

    channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps at strides 8, 16, 32 to levels `[B, H / s, W / s, channels]`, s out of `STRIDES`."""
        merged: list[jax.Array] = []  # from coarse to fine
        for x in reversed(maps):
            x = nn.Conv(self.channels, (1, 1))(nn.LayerNorm()(x))
            if merged:
                x = x + jax.image.resize(merged[-1], x.shape, "nearest")
            merged.append(x)
        levels = [nn.Conv(self.channels, (3, 3))(x) for x in reversed(merged)]
        for _ in range(2):
            levels.append(nn.Conv(self.channels, (3, 3), strides=2)(nn.relu(levels[-1])))
        return levels


def centers(level: jax.Array, stride: int) -> jax.Array:
    """Where in the image a level `[B, H, W, C]` has its places: `[H * W, 2]`, x and y in pixels."""
    height, width = level.shape[1:3]
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return (jnp.stack((x, y), -1).reshape(-1, 2) + 0.5) * stride


class DetectionHead(nn.Module):
    """Class scores, for a sigmoid, and boxes: left, top, right, bottom in pixels of the image."""

    num_classes: int
    channels: int = 256

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Levels to scores `[B, N, num_classes]` and boxes `[B, N, 4]`, N places in all."""
        tower = nn.Conv(self.channels, (3, 3), name="tower")
        rare = nn.initializers.constant(-math.log(99))  # at first a place is empty by 99%
        classify = nn.Conv(self.num_classes, (3, 3), bias_init=rare, name="classify")
        measure = nn.Conv(4, (3, 3), name="measure")
        scores, boxes = [], []
        for stride, level in zip(STRIDES, levels, strict=True):
            x = nn.relu(tower(level))
            scores.append(classify(x).reshape(len(x), -1, self.num_classes))
            distances = stride * nn.softplus(measure(x).reshape(len(x), -1, 4))
            signed = distances * jnp.array([-1.0, -1.0, 1.0, 1.0]).reshape(1, 1, 4)
            boxes.append(jnp.tile(centers(level, stride), 2)[None] + signed)
        return jnp.concatenate(scores, 1), jnp.concatenate(boxes, 1)


class Detector(nn.Module):
    """What comes after the backbone."""

    num_classes: int
    channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The backbone's four maps to class scores and boxes, as `DetectionHead` has them."""
        levels = FeaturePyramid(self.channels, name="pyramid")(maps[1:])
        return DetectionHead(self.num_classes, self.channels, name="head")(levels)


def main() -> None:
    """Show what comes out, on an image of noise."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    model = am.create_model("active_xtiny")  # or am.load_pretrained(DIRECTORY)
    detector = Detector(num_classes=80)
    images = jax.random.normal(jax.random.key(0), (1, 256, 320, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    maps = jax.jit(partial(model.apply, method="features"))(variables, images)
    rest = jax.jit(detector.init)(jax.random.key(2), maps)
    scores, boxes = jax.jit(detector.apply)(rest, maps)
    for found in maps:
        print("map   ", found.shape)
    print("scores", scores.shape)
    print("boxes ", boxes.shape)


if __name__ == "__main__":
    main()

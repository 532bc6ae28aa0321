"""Build parts of an object detector on the backbone: a feature pyramid and a shared head.

    python examples/feature_pyramid.py

The backbone returns unnormalized feature maps at strides 4, 8, 16 and 32. The last three become
pyramid levels P3 to P5 with the same number of channels, each merged with the coarser ones; P6 and
P7 are computed from P5. The head, shared by all levels, predicts class scores and a box at each
position of each level. A complete detector also needs a loss, data, and non-maximum suppression.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017). Boxes are distances
from a position to the four sides, as in Tian et al., "FCOS" (ICCV 2019).
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import activemlp_jax as am

STRIDES = (8, 16, 32, 64, 128)  # strides of P3 to P7, in pixels


class FeaturePyramid(nn.Module):
    """Turns backbone maps into pyramid levels with the same number of channels."""

    channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Turn maps at strides 8, 16, 32 into levels `[B, H/s, W/s, channels]`, s in `STRIDES`."""
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
    """Compute image coordinates (x, y) of a level's positions, `[H * W, 2]`, in pixels."""
    height, width = level.shape[1:3]
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return (jnp.stack((x, y), -1).reshape(-1, 2) + 0.5) * stride


class DetectionHead(nn.Module):
    """Predicts class logits, for a sigmoid, and boxes (left, top, right, bottom) in pixels."""

    num_classes: int
    channels: int = 256

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Predict scores `[B, N, num_classes]` and boxes `[B, N, 4]` at all N positions."""
        tower = nn.Conv(self.channels, (3, 3), name="tower")
        # Initially, each class has a probability of 1%.
        rare = nn.initializers.constant(-math.log(99))
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
    """Combines the feature pyramid and the head, which follow the backbone."""

    num_classes: int
    channels: int = 256

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Turn the backbone's four maps into the class scores and boxes of `DetectionHead`."""
        levels = FeaturePyramid(self.channels, name="pyramid")(maps[1:])
        return DetectionHead(self.num_classes, self.channels, name="head")(levels)


def main() -> None:
    """Print the shapes of the outputs for an image of noise."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    model = am.create_model("active_xtiny")  # or am.load_pretrained(DIRECTORY)
    detector = Detector(num_classes=80)
    images = jax.random.normal(jax.random.key(0), (1, 256, 320, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    maps = jax.jit(partial(model.apply, method="features"))(variables, images)
    detector_variables = jax.jit(detector.init)(jax.random.key(2), maps)
    scores, boxes = jax.jit(detector.apply)(detector_variables, maps)
    for feature_map in maps:
        print("map   ", feature_map.shape)
    print("scores", scores.shape)
    print("boxes ", boxes.shape)


if __name__ == "__main__":
    main()

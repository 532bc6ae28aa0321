"""Transforms of single images on the host, by Pillow: `[H, W, 3]` uint8 to the same."""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """`image` at `size` by `size` pixels, bicubic."""
    if image.shape[:2] == (size, size):
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def random_affine(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Rotate, scale, shear and shift at random around the centre; black comes in at the edges.

    Args:
      image: `[H, W, 3]` uint8.
      rng: drawn from six times.
      config: the limits, each symmetric around no change: `degrees` of rotation, `scale` as a
        factor's distance from 1, `shear` as a slope, `translate` as a share of the side.
    """
    angle = math.radians(rng.uniform(-config.degrees, config.degrees))
    scale_x, scale_y = 1 / rng.uniform(1 - config.scale, 1 + config.scale, 2)
    shear = rng.uniform(-config.shear, config.shear)
    height, width = image.shape[:2]
    shift_y, shift_x = rng.uniform(-config.translate, config.translate, 2) * (height, width)

    # Pillow wants the map from output to input pixels.
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = (
        np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]] @ np.diag([scale_x, scale_y])
    )
    centre = np.array([width / 2, height / 2])
    offset = centre - matrix @ (centre + np.array([shift_x, shift_y]))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def train_transform(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """What training sees of `image`: `[image_size, image_size, 3]` uint8."""
    return resize(random_affine(image, rng, config.affine), config.image_size)


def eval_transform(image: np.ndarray, config: ConfigDict) -> np.ndarray:
    """What evaluation sees of `image`: `[image_size, image_size, 3]` uint8."""
    return resize(image, config.image_size)

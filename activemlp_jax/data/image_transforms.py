"""Transforms of single images on the host, with Pillow.

Images are `[H, W, 3]` uint8 RGB arrays, or RGB Pillow images.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.data.warp import random_warp

CROP_TRIES = 10
JITTER_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class Box(NamedTuple):
    """A box in an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize `image` to `width` by `height` pixels, bicubic."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def draw_crop(rng: np.random.Generator, width: int, height: int, config: ConfigDict) -> Box:
    """Draw a random crop of an image of `width` by `height` pixels.

    The area is uniform from `min_area` to `max_area`, shares of the image's area. Width / height is
    log-uniform from `min_ratio` to `max_ratio`, and the position is uniform among those inside the
    image. A crop that does not fit is drawn again. If none of `CROP_TRIES` crops fits,
    the result is the largest centered crop with a ratio within the limits. `config` is the section
    `augment.crop`.

    Source: the training transform of the authors' release (torchvision's RandomResizedCrop).
    """
    log_ratios = math.log(config.min_ratio), math.log(config.max_ratio)
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(config.min_area, config.max_area)
        ratio = math.exp(rng.uniform(*log_ratios))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return Box(left, top, box_width, box_height)
    ratio = min(max(width / height, config.min_ratio), config.max_ratio)
    box_width = min(width, max(1, round(height * ratio)))
    box_height = min(height, max(1, round(width / ratio)))
    return Box((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def color_jitter(picture: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation of an RGB image at random, in random order.

    Each factor is uniform from max(0, 1 - `strength`) to 1 + `strength`.

    Source: the training transform of the authors' release (torchvision's ColorJitter, no hue).
    """
    for index in rng.permutation(len(JITTER_ENHANCERS)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        picture = JITTER_ENHANCERS[index](picture).enhance(factor)
    return picture


def augmented_crop(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Apply the authors' training transform, except for normalization, to an image.

    `config` is the whole config. The keys `data.image_size`, and `crop`, `flip`, `rand_augment` and
    `color_jitter` of `augment` are used, the last one only if `rand_augment` is empty.

    Source: the training transform of the authors' release (timm's `transforms_imagenet_train`).
    """
    augment, size = config.augment, config.data.image_size
    height, width = image.shape[:2]
    box = draw_crop(rng, width, height, augment.crop)
    # Crop before resizing: `resize(..., box=box)` would also read pixels around the box.
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    picture = Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < augment.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.rand_augment:
        picture = parse_randaugment(augment.rand_augment)(picture, rng)
    elif augment.color_jitter:
        picture = color_jitter(picture, rng, augment.color_jitter)
    return np.asarray(picture)


def warped(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Apply `random_warp` with `config.augment.warp`, and resize to `config.data.image_size`."""
    size = config.data.image_size
    return resize(random_warp(image, rng, config.augment.warp), size, size)


# The augmentation policies, keyed by the value of `config.augment.policy`. Each maps an image
# `[H, W, 3]` uint8, a random generator and the whole config to an augmented image
# `[image_size, image_size, 3]` uint8.
POLICIES: dict[str, Callable[[np.ndarray, np.random.Generator, ConfigDict], np.ndarray]] = {
    "warp": warped,
    "random_resized_crop": augmented_crop,
}


def eval_transform(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resize an image and crop its center, for evaluation.

    The short side becomes `int(resize_factor * image_size)` pixels, and the long side follows in
    proportion, truncated. Resizing is bicubic. The offset of the crop is rounded half to even.

    Args:
      image: `[H, W, 3]` uint8.
      preprocessing: its `image_size` S and `resize_factor` are used.

    Returns:
      `[S, S, 3]` uint8.

    Source: the evaluation transform of the authors' release, reproduced pixel for pixel.
    """
    size = preprocessing.image_size
    short = int(preprocessing.resize_factor * size)
    height, width = image.shape[:2]
    long = int(short * max(height, width) / min(height, width))
    new_width, new_height = (short, long) if width <= height else (long, short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resize(image, new_width, new_height)[top : top + size, left : left + size]

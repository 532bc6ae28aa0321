"""Transforms of single images on the host, by Pillow: `[H, W, 3]` uint8 to the same."""

import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.data.warp import random_warp

CROP_TRIES = 10
JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """`image` at `size` by `size` pixels, bicubic."""
    if image.shape[:2] == (size, size):
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


def draw_crop(rng: np.random.Generator, width: int, height: int, config: ConfigDict) -> Box:
    """A random part of an image of `width` by `height` pixels.

    Its area is uniform, its ratio of width to height log-uniform, its place uniform among those
    inside. What does not fit is drawn again; after `CROP_TRIES` it is the largest centred part
    whose ratio is within the limits.

    Args:
      rng: for the draws.
      width: of the image.
      height: of the image.
      config: `min_area` and `max_area` as shares of the image's, `min_ratio` and `max_ratio`.

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
    """Brightness, contrast and saturation, in random order, times 1 - `strength` to 1 + it.

    Source: the training transform of the authors' release (torchvision's ColorJitter, no hue).
    """
    for which in rng.permutation(len(JITTERED)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        picture = JITTERED[which](picture).enhance(factor)
    return picture


def augmented_crop(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """The original's training transform, up to normalising.

    Args:
      image: `[H, W, 3]` uint8.
      rng: for all draws.
      config: `config.data`: `image_size`, `crop`, `flip`, `randaugment`, `color_jitter`.

    Source: the training transform of the authors' release (timm's `transforms_imagenet_train`).
    """
    height, width = image.shape[:2]
    box = draw_crop(rng, width, height, config.crop)
    # Cropped first: resizing with a box would read the pixels around it.
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    picture = Image.fromarray(part).resize((config.image_size,) * 2, Image.Resampling.BICUBIC)
    if rng.random() < config.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.randaugment:
        picture = parse_randaugment(config.randaugment)(picture, rng)
    elif config.color_jitter:
        picture = color_jitter(picture, rng, config.color_jitter)
    return np.asarray(picture)


def train_transform(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """What training sees of `image`: `[image_size, image_size, 3]` uint8.

    `config` is `config.data`; its `augmentation` is 'warp' or 'random_resized_crop'.
    """
    if config.augmentation == "warp":
        return resize(random_warp(image, rng, config.warp), config.image_size)
    return augmented_crop(image, rng, config)


def eval_transform(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """What evaluation sees of `image`: the centre, `[image_size, image_size, 3]` uint8.

    The short side is resized, bicubic, with the long side in proportion, truncated; the crop's
    offset is rounded half to even.

    Source: the evaluation transform of the authors' release, pixel for pixel.
    """
    size = preprocessing.image_size
    short = int(preprocessing.resize_factor * size)
    height, width = image.shape[:2]
    long = int(short * max(height, width) / min(height, width))
    new_width, new_height = (short, long) if width <= height else (long, short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = image
    if (height, width) != (new_height, new_width):
        resized = np.asarray(
            Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
        )
    return resized[top : top + size, left : left + size]

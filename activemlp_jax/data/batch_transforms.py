"""Normalization and augmentation of batches on the device, inside the jitted step.

Normalized images are `[B, H, W, 3]` float32, whatever dtype the model computes in, because bfloat16
keeps only about three digits, too few for a mixing weight or an area. Random numbers depend on the
key alone, so they are the same on any number of devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

ERASING_AREA = (0.02, 1 / 3)  # as a share of the image's area
ERASING_RATIO = (0.3, 1 / 0.3)  # height to width
ERASING_TRIES = 10


class Boxes(NamedTuple):
    """Boxes in pixels; each field is `[N]` int32, and `bottom` and `right` are exclusive."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array

    def mask(self, height: int, width: int) -> jax.Array:
        """Return a bool mask `[N, height, width]` that is true inside the boxes."""
        y = jnp.arange(height)[None, :, None]
        x = jnp.arange(width)[None, None, :]
        top, bottom, left, right = (side[:, None, None] for side in self)
        return (top <= y) & (y < bottom) & (left <= x) & (x < right)


class Mixing(NamedTuple):
    """The mixup or cutmix draws of a batch, one per mixing group (images that share one draw).

    Every field has one value per group. `weight`, float32, is the share of an image's own label in
    its mixed label. If `is_cutmix`, the pixels inside `box` come from the partner image and the
    others stay. Otherwise (mixup), every pixel becomes `weight` times its own value plus
    `1 - weight` times its partner's.
    """

    weight: jax.Array
    is_cutmix: jax.Array
    box: Boxes


def mixes(config: ConfigDict) -> bool:
    """Return whether mixup or cutmix is turned on; `config` is the whole config."""
    return bool(config.augment.mixup_alpha or config.augment.cutmix_alpha)


def group_size(config: ConfigDict) -> int:
    """Return the size of a mixing group: consecutive rows of a batch that share one draw.

    Rows are mixed only with rows of their own group. Without mixup and cutmix, the whole batch is
    one group. `config` is the whole config.
    """
    batch_size = config.batch_size
    return min(config.augment.mix_group_size, batch_size) if mixes(config) else batch_size


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Convert images to float32, subtract the mean, and divide by the standard deviation.

    Args:
      images: `[B, H, W, 3]` uint8.
      mean: mean of each channel, on a scale from 0 to 1.
      std: standard deviation of each channel, on the same scale.
    """
    shape = (1, 1, 1, 3)
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)


def draw_erasing_boxes(key: jax.Array, count: int, height: int, width: int) -> Boxes:
    """Draw one box to erase in each of `count` images.

    The area is uniform in `ERASING_AREA`, and the ratio of height to width is log-uniform in
    `ERASING_RATIO`. The sides are rounded to whole pixels. Of `ERASING_TRIES` such draws, the first
    with both sides smaller than the image's is used; if there is none, the box is empty. The
    position is uniform among those where the box lies inside the image.

    Source: random erasing of the authors' release (timm's RandomErasing, one box).
    """
    keys = jax.random.split(key, 4)
    shape = (count, ERASING_TRIES)
    area = (
        height
        * width
        * jax.random.uniform(keys[0], shape, minval=ERASING_AREA[0], maxval=ERASING_AREA[1])
    )
    low, high = map(math.log, ERASING_RATIO)
    ratio = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    heights = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = fits & (jnp.cumsum(fits, axis=1) == 1)
    # A masked sum, because indexing is slow on TPUs.
    box_height, box_width = (jnp.where(first, sides, 0).sum(1) for sides in (heights, widths))
    top = jax.random.randint(keys[2], (count,), 0, height - box_height + 1)
    left = jax.random.randint(keys[3], (count,), 0, width - box_width + 1)
    return Boxes(top, top + box_height, left, left + box_width)


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fill a random box of some normalized images `[B, H, W, 3]` with standard normal noise.

    Each image gets a box with `probability`; see `draw_erasing_boxes`.
    """
    count, height, width, _ = images.shape
    coin, boxes, noise = jax.random.split(key, 3)
    erased = jax.random.uniform(coin, (count, 1, 1)) < probability
    mask = draw_erasing_boxes(boxes, count, height, width).mask(height, width) & erased
    return jnp.where(mask[..., None], jax.random.normal(noise, images.shape), images)


def draw_mixing(
    key: jax.Array,
    groups: int,
    height: int,
    width: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> Mixing:
    """Draw mixup or cutmix for `groups` mixing groups of images of `height` by `width` pixels.

    A group gets cutmix with probability `cutmix_probability`, and mixup otherwise. A method with an
    alpha of 0 is never drawn. Lambda, the share of an image's own label, follows Beta(alpha,
    alpha), with the alpha of the drawn method. The cutmix box measures
    `int(side * sqrt(1 - lambda))` for each side of the image, minus one pixel if that is odd. Its
    center is a uniformly drawn pixel of the image. The box is clipped to the image, and lambda is
    corrected to match the clipped area.

    Source: mixup and cutmix of the authors' release (timm's Mixup, mode 'batch').
    """
    keys = jax.random.split(key, 5)
    if not (mixup_alpha and cutmix_alpha):
        cutmix_probability = float(bool(cutmix_alpha))
    is_cutmix = jax.random.uniform(keys[0], (groups,)) < cutmix_probability
    mixup_share = jax.random.beta(keys[1], mixup_alpha or 1.0, mixup_alpha or 1.0, (groups,))
    cutmix_share = jax.random.beta(keys[2], cutmix_alpha or 1.0, cutmix_alpha or 1.0, (groups,))

    side = jnp.sqrt(1 - cutmix_share)
    half_height = (height * side).astype(jnp.int32) // 2
    half_width = (width * side).astype(jnp.int32) // 2
    y = jax.random.randint(keys[3], (groups,), 0, height)
    x = jax.random.randint(keys[4], (groups,), 0, width)
    box = Boxes(
        jnp.maximum(y - half_height, 0),
        jnp.minimum(y + half_height, height),
        jnp.maximum(x - half_width, 0),
        jnp.minimum(x + half_width, width),
    )
    area = (box.bottom - box.top) * (box.right - box.left)
    weight = jnp.where(is_cutmix, 1 - area / (height * width), mixup_share)
    return Mixing(weight.astype(jnp.float32), is_cutmix, box)


def mix(images: jax.Array, targets: jax.Array, mixing: Mixing) -> tuple[jax.Array, jax.Array]:
    """Mix each image with its partner, the image at the mirrored position in its mixing group.

    Args:
      images: `[B, H, W, 3]`; each mixing group is a block of consecutive rows, all equally large.
      targets: `[B, K]` class probabilities.
      mixing: how to mix each group; the number of groups must divide B.

    Returns:
      The mixed images and targets, with unchanged shapes.

    Source: see `draw_mixing`.
    """
    groups = len(mixing.weight)
    height, width = images.shape[1:3]
    weight = mixing.weight[:, None, None]
    inside = mixing.box.mask(height, width)
    is_cutmix = mixing.is_cutmix[:, None, None]
    pixel_weight = jnp.where(is_cutmix, jnp.where(inside, 0.0, 1.0), weight)

    def blend(values: jax.Array, own: jax.Array) -> jax.Array:
        grouped = values.reshape(groups, -1, *values.shape[1:])
        return (grouped * own + grouped[:, ::-1] * (1 - own)).reshape(values.shape)

    return blend(images, pixel_weight[:, None, :, :, None]), blend(targets, weight)

"""What is done to batches on the device, inside the jitted step.

Images are `[B, H, W, 3]` float32 here, whatever the model computes in: a mixing weight or an area
in bfloat16 would have three digits. Random numbers follow from the key alone, so they are the same
on any number of devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

ERASING_AREA = (0.02, 1 / 3)  # of the image's
ERASING_RATIO = (0.3, 1 / 0.3)  # height to width
ERASING_TRIES = 10


class Boxes(NamedTuple):
    """Parts of images, in pixels: each a `[N]` int32; `bottom` and `right` lie just outside."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array

    def mask(self, height: int, width: int) -> jax.Array:
        """`[N, height, width]`, true inside."""
        y = jnp.arange(height)[None, :, None]
        x = jnp.arange(width)[None, None, :]
        top, bottom, left, right = (side[:, None, None] for side in self)
        return (top <= y) & (y < bottom) & (left <= x) & (x < right)


class Mixing(NamedTuple):
    """How each group of a batch is mixed: `[G]` each.

    Where `is_cutmix`, the pixels in `box` come from the partner; elsewhere each is `weight` times
    its own and the rest its partner's. `weight` float32 is the own label's share in either case.
    """

    weight: jax.Array
    is_cutmix: jax.Array
    box: Boxes


def mixes(config: ConfigDict) -> bool:
    """Whether batches are mixed at all; `config` is the whole config."""
    return bool(config.mix.mixup_alpha or config.mix.cutmix_alpha)


def group_size(config: ConfigDict) -> int:
    """Rows of a batch that are mixed alike and among themselves; all of them where nothing is.

    `config` is the whole config.
    """
    return min(config.mix.group_size, config.batch_size) if mixes(config) else config.batch_size


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`images` `[B, H, W, 3]` uint8 to float32 with `mean` and `std`, both of the range 0 to 1."""
    shape = (1, 1, 1, 3)
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)


def draw_erasing_boxes(key: jax.Array, count: int, height: int, width: int) -> Boxes:
    """A box to erase for each of `count` images; empty where none of `ERASING_TRIES` was smaller.

    The area is uniform in `ERASING_AREA` of the image's, the ratio log-uniform in `ERASING_RATIO`,
    sides are rounded, and the place is uniform among those inside.

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
    # A sum in place of an index, which TPUs are slow at.
    box_height, box_width = (jnp.where(first, sides, 0).sum(1) for sides in (heights, widths))
    top = jax.random.randint(keys[2], (count,), 0, height - box_height + 1)
    left = jax.random.randint(keys[3], (count,), 0, width - box_width + 1)
    return Boxes(top, top + box_height, left, left + box_width)


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """`images`, normalised, each with `probability` a box of standard normal noise in it.

    Source: as `draw_erasing_boxes`.
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
    """One mixing for each of `groups`: mixup, or with `cutmix_probability` cutmix.

    The share of the own image, lambda, follows Beta(alpha, alpha) of the kind drawn. Of cutmix, the
    box has the sides `int(side * sqrt(1 - lambda))` around a uniform pixel, an odd side loses a
    pixel, what lies outside is cut off, and lambda is corrected to the area that is left. A kind
    whose alpha is 0 is never drawn.

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
    """Mix each group of a batch with itself in reverse order, images and targets alike.

    Args:
      images: `[B, H, W, 3]`; groups are consecutive, as many as `mixing` has, which divides B.
      targets: `[B, K]`, probabilities.
      mixing: of each group.

    Source: as `draw_mixing`.
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

"""Transforms of images and segmentation masks on the host, with OpenCV, as in mmsegmentation.

Images are `[H, W, 3]` uint8 RGB. Masks are `[H, W]` uint8, with a class index or `IGNORED` per
pixel. Functions that resize or change colors raise UserError if OpenCV is not installed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.utils.errors import UserError, install_command

IGNORED = 255  # label of pixels that count neither in training nor in evaluation
CROP_TRIES = 10
BRIGHTNESS = 32  # largest shift in either direction, on a scale of 0 to 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # largest shift in either direction, in steps of two degrees
HUES = 180


@functools.cache
def load_opencv() -> Any:
    """Import OpenCV, the module `cv2`; raise UserError if it is not installed."""
    try:
        import cv2  # optional, and only segmentation needs it
    except ImportError as error:
        raise UserError(f"segmentation needs OpenCV: {install_command('segmentation')}") from error
    cv2.setNumThreads(0)  # the data loader runs transforms in parallel threads itself
    return cv2


def labels_of_mask(
    mask: np.ndarray, name: str, shape: tuple[int, ...], classes: int, reduce_zero_label: bool
) -> np.ndarray:
    """Convert the stored values of a mask to labels, `[H, W]` uint8: class indices or `IGNORED`.

    Args:
      mask: `[H, W]` uint8, as stored.
      name: the name of the mask in error messages.
      shape: the (height, width) of the image.
      classes: the number of classes.
      reduce_zero_label: whether stored values count classes from 1, and 0 means no class. Then 0
        becomes `IGNORED`, and all values but `IGNORED` are reduced by 1.

    Raises:
      UserError: the mask and the image differ in size, or a value is not a label of a class.

    Source: mmsegmentation's LoadAnnotations.
    """
    if mask.shape != shape:
        raise UserError(
            f"{name} has {mask.shape[1]} x {mask.shape[0]} pixels, expected those of its image, "
            f"{shape[1]} x {shape[0]}"
        )
    first = int(reduce_zero_label)
    present = np.bincount(mask.ravel(), minlength=256)
    beyond = np.flatnonzero(present[first + classes : IGNORED])
    if beyond.size:
        unlabeled = f"0 or {IGNORED}" if reduce_zero_label else str(IGNORED)
        raise UserError(
            f"{name} has the label {first + classes + beyond[0]}, expected {first} to "
            f"{first + classes - 1} for the {classes} classes, or {unlabeled} for none"
        )
    if not reduce_zero_label:
        return mask
    reduced = np.arange(-1, IGNORED)
    reduced[[0, IGNORED]] = IGNORED
    return reduced.astype(np.uint8)[mask]


def resized_shape(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Compute the largest (height, width) that fits into `scale` and keeps an image's aspect ratio.

    `scale` is the maximum of the long side and of the short side, in pixels.

    Source: mmcv's `rescale_size`.
    """
    long, short = scale
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize an image to (height, width), bilinear without antialiasing, as mmsegmentation does."""
    cv2 = load_opencv()
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize a mask to (height, width), by nearest neighbor, as mmsegmentation does."""
    cv2 = load_opencv()
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)


# The four changes of color below are those of mmsegmentation's PhotoMetricDistortion, with OpenCV's
# 8-bit HSV. They clip values to 0 to 255 and truncate them; hue wraps around instead.
LEVELS = np.arange(256, dtype=np.uint8)


def _truncated(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _change_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Map the values of one HSV channel of an RGB image through `table`, `[256]`."""
    cv2 = load_opencv()
    tables = np.stack([LEVELS] * 3, axis=-1)
    tables[:, channel] = table
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB)


def change_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Add `delta` to an image."""
    return load_opencv().LUT(image, _truncated(LEVELS + np.float32(delta)))


def change_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply an image by `factor`."""
    return load_opencv().LUT(image, _truncated(LEVELS * np.float32(factor)))


def change_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation of an image by `factor`."""
    return _change_hsv(image, 1, _truncated(LEVELS * np.float32(factor)))


def change_hue(image: np.ndarray, shift: int) -> np.ndarray:
    """Rotate the hue of an image by `shift` steps of two degrees."""
    return _change_hsv(image, 0, ((LEVELS.astype(int) + shift) % HUES).astype(np.uint8))


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue at random, each with probability 1/2.

    Contrast is changed either before or after saturation and hue, with equal probability.

    Source: mmsegmentation's PhotoMetricDistortion.
    """
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        image = change_brightness(image, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    if contrast_first and rng.random() < 0.5:
        image = change_contrast(image, rng.uniform(*CONTRAST))
    if rng.random() < 0.5:
        image = change_saturation(image, rng.uniform(*SATURATION))
    if rng.random() < 0.5:
        image = change_hue(image, int(rng.integers(-HUE, HUE)))
    if not contrast_first and rng.random() < 0.5:
        image = change_contrast(image, rng.uniform(*CONTRAST))
    return image


def draw_crop_position(
    mask: np.ndarray, size: int, rng: np.random.Generator, max_share: float
) -> tuple[int, int]:
    """Draw the (top, left) of a random crop of `size` by `size` pixels.

    A crop is drawn again, up to `CROP_TRIES` times, if it has fewer than two classes or if one
    class covers at least `max_share` of its labeled pixels. If `max_share` is 1, the first crop is
    accepted. Along a side of the mask that is shorter than `size`, the crop starts at 0.

    Source: mmsegmentation's RandomCrop.
    """
    height, width = mask.shape

    def draw() -> tuple[int, int]:
        top = int(rng.integers(max(0, height - size) + 1))
        return top, int(rng.integers(max(0, width - size) + 1))

    top, left = draw()
    if max_share >= 1:
        return top, left
    for _ in range(CROP_TRIES):
        crop = mask[top : top + size, left : left + size]
        counts = np.bincount(crop.ravel(), minlength=256)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
        top, left = draw()
    return top, left


def pad(array: np.ndarray, shape: Sequence[int], value: float = 0) -> np.ndarray:
    """Pad the first axes of `array`, at their ends, to the lengths in `shape`."""
    extra = [(0, side - present) for side, present in zip(shape, array.shape, strict=False)]
    return np.pad(array, extra + [(0, 0)] * (array.ndim - len(extra)), constant_values=value)


def scene_train_transform(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, config: ConfigDict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resize, crop, flip and distort an image and its mask at random, for training.

    The image is resized to fit into `long_side` by `short_side` pixels, both multiplied by a random
    ratio. A result smaller than the crop is padded at the bottom and right: the mask with
    `IGNORED`, the image with 0. After normalization, the task sets the padding to 0 again.

    Args:
      image: the image.
      mask: its mask.
      rng: random generator.
      config: the whole config. `data.image_size` is the side S of the crop. `data.scene` has
        `long_side` (0 for no resizing) and `short_side`. `augment.flip` is a probability.
        `augment.scene` has the limits of the random ratio (`min_scale` and `max_scale`),
        `max_class_share` (see `draw_crop_position`), and `photometric`: whether to change colors.

    Returns:
      The image `[S, S, 3]` uint8, the mask `[S, S]` uint8, and the (height, width) `[2]` int32 of
      the part that is not padding.

    Source: mmsegmentation's training pipeline for ADE20K.
    """
    size, limit, augment = config.data.image_size, config.data.scene, config.augment
    if limit.long_side:
        ratio = rng.uniform(augment.scene.min_scale, augment.scene.max_scale)
        scale = int(limit.long_side * ratio), int(limit.short_side * ratio)
        shape = resized_shape(mask.shape[0], mask.shape[1], scale)
        image, mask = resize_image(image, shape), resize_mask(mask, shape)
    top, left = draw_crop_position(mask, size, rng, augment.scene.max_class_share)
    image = image[top : top + size, left : left + size]
    mask = mask[top : top + size, left : left + size]
    if rng.random() < augment.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if augment.scene.photometric:
        image = photometric_distortion(np.ascontiguousarray(image), rng)
    extent = np.array(mask.shape, np.int32)
    return pad(image, (size, size)), pad(mask, (size, size), IGNORED), extent

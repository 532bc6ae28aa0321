"""Transforms of a scene and its mask on the host, by OpenCV, as those of mmsegmentation.

Images are `[H, W, 3]` uint8 RGB, masks `[H, W]` uint8: a class a pixel, or `IGNORED`.
"""

import functools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.utils.errors import UserError, install_command

IGNORED = 255  # the label of a pixel that counts neither in training nor in evaluation
CROP_TRIES = 10
BRIGHTNESS = 32  # the most of a shift, in grey levels
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # the limit of a shift, in steps of two degrees
HUES = 180


@functools.cache
def load_opencv() -> Any:
    """OpenCV, the module `cv2`; UserError if it is not installed."""
    try:
        import cv2  # an extra, and only segmentation needs it
    except ImportError as error:
        raise UserError(f"segmentation needs OpenCV: {install_command('segmentation')}") from error
    cv2.setNumThreads(0)  # the pipeline's threads are the parallelism
    return cv2


def resized_shape(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) at which an image fits into `scale`, its proportions kept.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      scale: the most of the long side and of the short side, in pixels.

    Source: mmcv's `rescale_size`.
    """
    long, short = scale
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`image`, `[H, W, 3]` uint8, at (height, width) `shape`: bilinear, without antialiasing.

    Source: mmsegmentation's Resize.

    Raises:
      UserError: OpenCV is not installed.
    """
    cv2 = load_opencv()
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`mask`, `[H, W]` uint8, at (height, width) `shape`: each pixel is the nearest's.

    Source: mmsegmentation's Resize.

    Raises:
      UserError: OpenCV is not installed.
    """
    cv2 = load_opencv()
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)


LEVELS = np.arange(256, dtype=np.uint8)


def _truncated(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _change_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """`image` with the values of one channel of its HSV form looked up in `table`, `[256]`."""
    cv2 = load_opencv()
    tables = np.stack([LEVELS] * 3, axis=-1)
    tables[:, channel] = table
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB)


def change_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """`image`, `[H, W, 3]` uint8, plus `delta` grey levels, clipped and truncated.

    Source: mmsegmentation's PhotoMetricDistortion.

    Raises:
      UserError: OpenCV is not installed.
    """
    return load_opencv().LUT(image, _truncated(LEVELS + np.float32(delta)))


def change_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """`image`, `[H, W, 3]` uint8, times `factor`, clipped and truncated.

    Source: mmsegmentation's PhotoMetricDistortion.

    Raises:
      UserError: OpenCV is not installed.
    """
    return load_opencv().LUT(image, _truncated(LEVELS * np.float32(factor)))


def change_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """`image`, `[H, W, 3]` uint8, with its saturation times `factor`, clipped and truncated.

    Source: mmsegmentation's PhotoMetricDistortion, on OpenCV's 8-bit HSV.

    Raises:
      UserError: OpenCV is not installed.
    """
    return _change_hsv(image, 1, _truncated(LEVELS * np.float32(factor)))


def change_hue(image: np.ndarray, shift: int) -> np.ndarray:
    """`image`, `[H, W, 3]` uint8, with its hue turned by `shift` steps of two degrees.

    Source: mmsegmentation's PhotoMetricDistortion, on OpenCV's 8-bit HSV.

    Raises:
      UserError: OpenCV is not installed.
    """
    return _change_hsv(image, 0, ((LEVELS.astype(int) + shift) % HUES).astype(np.uint8))


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue changed at random, each with probability 1/2.

    Contrast comes before saturation and hue or, as often, after them.

    Args:
      image: `[H, W, 3]` uint8.
      rng: for all draws.

    Source: mmsegmentation's PhotoMetricDistortion.

    Raises:
      UserError: OpenCV is not installed.
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


def draw_crop_place(
    mask: np.ndarray, size: int, rng: np.random.Generator, max_share: float
) -> tuple[int, int]:
    """The (top, left) of a random crop of `size` by `size` pixels.

    It is drawn again, `CROP_TRIES` times at most, while the crop has labels of fewer than two
    classes, or one class has `max_share` or more of the pixels that have a label.

    Args:
      mask: `[H, W]` uint8; along a side shorter than `size` the crop starts at 0.
      size: of the crop, in pixels.
      rng: for the draws.
      max_share: 1 for taking the first place, whatever is there.

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


def _padded(array: np.ndarray, size: int, value: int) -> np.ndarray:
    """`array` `[H, W, ...]`, filled up with `value` at the bottom and right to `size`."""
    height, width = array.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(array)
    padded = np.full((size, size, *array.shape[2:]), value, array.dtype)
    padded[:height, :width] = array
    return padded


def scene_train_transform(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, data: ConfigDict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What training sees of a scene, up to normalising: resized, cropped, flipped and distorted.

    Args:
      image: `[H, W, 3]` uint8.
      mask: `[H, W]` uint8.
      rng: for all draws.
      data: `config.data`: `image_size` S, `flip` (a probability) and `scene`: `long_side` and
        `short_side`, in pixels, that a scene is fitted into (no resizing where the former is 0),
        both times a ratio between `min_ratio` and `max_ratio`; `max_class_share` of a crop (see
        `draw_crop_place`); and `photometric`, whether to change colours.

    Returns:
      The image `[S, S, 3]` uint8; the mask `[S, S]` uint8; and the (height, width) `[2]` int32 of
      the part that is no padding: what was smaller than S is filled up at the bottom and right,
      the image with 0, to become 0 again after normalising, and the mask with `IGNORED`.

    Source: mmsegmentation's training pipeline for ADE20K.

    Raises:
      UserError: OpenCV is not installed.
    """
    size, scene = data.image_size, data.scene
    if scene.long_side:
        ratio = rng.uniform(scene.min_ratio, scene.max_ratio)
        scale = int(scene.long_side * ratio), int(scene.short_side * ratio)
        shape = resized_shape(mask.shape[0], mask.shape[1], scale)
        image, mask = resize_image(image, shape), resize_mask(mask, shape)
    top, left = draw_crop_place(mask, size, rng, scene.max_class_share)
    image = image[top : top + size, left : left + size]
    mask = mask[top : top + size, left : left + size]
    if rng.random() < data.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if scene.photometric:
        image = photometric_distortion(np.ascontiguousarray(image), rng)
    extent = np.array(mask.shape, np.int32)
    return _padded(image, size, 0), _padded(mask, size, IGNORED), extent

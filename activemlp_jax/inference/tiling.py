"""Plan the views of a scene for a segmentation model, and how to merge their logits.

A view is one input of the network: the whole scene, resized and possibly flipped, or one window of
it. Before the logits of views are summed, they are resized to the view, placed in the scene,
divided by the number of windows that cover each position, resized to the original size, and flipped
back if the view was flipped. These steps are linear and act separately on height and width.
Therefore two matrices per view do all of them at once: `rows @ logits @ columns.T`.

Logits of views with the same scale and flip are summed before the softmax. After the softmax,
probabilities are averaged over scales and flips.

Source: the whole, sliding and multi-scale inference of mmsegmentation 0.11.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_transforms import resize_image, resized_shape
from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
SLIDE_STRIDE_SHARE = 2 / 3  # of the windows' side
Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Scales, flips and windows of inference; the defaults are the published single-scale protocol.

    Args:
      scales: factors for the size to which images are resized; probabilities are averaged over
        them.
      flip: whether each scale also has views of the image flipped left to right.
      size_multiple: the resized sides are rounded to multiples of this number of pixels, so that
        fewer shapes are compiled; 1 is exact.
      stride_share: distance between the starts of neighboring windows on the resized image, as a
        fraction of their side; 0 uses whole images.

    Raises:
      ValueError: if a value is invalid; the message names it.

    Source: the multi-scale and sliding test of mmsegmentation 0.11.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    size_multiple: int = 1
    stride_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales is {self.scales!r}, expected numbers above 0, at least one")
        if self.size_multiple < 1:
            raise ValueError(f"size_multiple is {self.size_multiple!r}, expected at least 1")
        if not 0 <= self.stride_share <= 1:  # windows further apart leave gaps
            raise ValueError(f"stride_share is {self.stride_share!r}, expected 0 to 1")

    def stride(self, preprocessing: ScenePreprocessing) -> int:
        """Compute the pixels between the starts of windows, rounded down; 0 for whole images."""
        return int(self.stride_share * preprocessing.window)

    def describe(self, preprocessing: ScenePreprocessing) -> str:
        """Describe the protocol, such as 'windows of 512 every 341 pixels, scales 0.5, 1.0'."""
        stride = self.stride(preprocessing)
        windows = f"windows of {preprocessing.window} every {stride} pixels"
        parts = [windows if stride else "whole images"]
        if self.scales != (1.0,):
            parts.append(f"scales {', '.join(map(str, self.scales))}")
        if self.flip:
            parts.append("flips")
        if self.size_multiple > 1:
            parts.append(f"sides rounded to multiples of {self.size_multiple} (not as published)")
        return ", ".join(parts)


PUBLISHED = Protocol()


def make_protocol(multi_scale: bool, slide: bool, size_multiple: int | None = None) -> Protocol:
    """Make a protocol from command-line options."""
    return Protocol(
        scales=MULTI_SCALE if multi_scale else (1.0,),
        flip=multi_scale,
        size_multiple=size_multiple or 1,
        stride_share=SLIDE_STRIDE_SHARE if slide else 0.0,
    )


class View(NamedTuple):
    """One input of the network: a window of the resized scene.

    The scene is resized to `resized` (height, width), and then flipped left to right if
    `flipped`. The window starts at `start` (top, left) and has `shape` (height, width). `group` is
    the index of the scale and flip.
    """

    resized: Shape
    flipped: bool
    start: Shape
    shape: Shape
    group: int


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Compute where windows start along an axis; the last one is shifted back to fit inside."""
    number = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(number)]


def plan_views(
    height: int, width: int, preprocessing: ScenePreprocessing, protocol: Protocol
) -> list[View]:
    """List the views of a scene of `height` by `width` pixels, ordered by scale, flip, position."""
    views: list[View] = []
    group, stride = 0, protocol.stride(preprocessing)
    for scale in protocol.scales:
        limits = int(preprocessing.long_side * scale), int(preprocessing.short_side * scale)
        if preprocessing.long_side:
            tall, wide = resized_shape(height, width, limits)
        else:
            tall, wide = int(height * scale + 0.5), int(width * scale + 0.5)
        multiple = protocol.size_multiple
        resized = _round_side(tall, multiple), _round_side(wide, multiple)
        side = preprocessing.window if stride else max(resized)
        window = min(resized[0], side), min(resized[1], side)
        for flipped in (False, True) if protocol.flip else (False,):
            views += [
                View(resized, flipped, (top, left), window, group)
                for top in _window_starts(resized[0], window[0], stride or 1)
                for left in _window_starts(resized[1], window[1], stride or 1)
            ]
            group += 1
    return views


def _round_side(side: int, multiple: int) -> int:
    """Round `side` to a multiple of `multiple` that is at least `MIN_IMAGE_SIDE`."""
    return max(round(side / multiple) * multiple, math.ceil(MIN_IMAGE_SIDE / multiple) * multiple)


def cut_views(image: np.ndarray, views: list[View]) -> list[np.ndarray]:
    """Resize and flip `image` `[H, W, 3]` uint8 as each view says, and cut out its pixels."""

    @functools.cache
    def resized(shape: Shape) -> np.ndarray:
        return image if shape == image.shape[:2] else resize_image(image, shape)

    pixels = []
    for view in views:
        (top, left), (height, width) = view.start, view.shape
        whole = resized(view.resized)[:, ::-1] if view.flipped else resized(view.resized)
        pixels.append(np.ascontiguousarray(whole[top : top + height, left : left + width]))
    return pixels


@functools.lru_cache(maxsize=256)
def bilinear_matrix(size: int, length: int) -> np.ndarray:
    """Build the float64 matrix `[size, length]` that resizes an axis as `resize_bilinear` does."""
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    floor = np.minimum(position.astype(int), max(length - 2, 0))
    matrix = np.zeros((size, length))
    rows = np.arange(size)
    matrix[rows, floor] = 1 - (position - floor)
    if length > 1:
        matrix[rows, floor + 1] = position - floor
    return matrix


def logits_side(side: int) -> int:
    """Compute the logits' side for a view's `side`; the stem has kernel 7, stride 4, padding 2."""
    return (side + 2 * 2 - 7) // 4 + 1


def view_matrices(
    height: int, width: int, views: list[View]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Build the two matrices of each of a scene's views; see the module's docstring.

    Returns:
      `rows` `[height, h]` and `columns` `[width, w]` for each view, float64.
    """

    @functools.cache
    def matrix(axis: int, resized: int, start: int, window: int, flipped: bool) -> np.ndarray:
        placed = np.zeros((resized, logits_side(window)))
        placed[start : start + window] = bilinear_matrix(window, logits_side(window))
        coverage = np.zeros(resized)
        for other in {view.start[axis] for view in views if view.resized[axis] == resized}:
            coverage[other : other + window] += 1
        whole = bilinear_matrix((height, width)[axis], resized) @ (placed / coverage[:, None])
        return whole[::-1] if flipped else whole

    return [
        (
            matrix(0, view.resized[0], view.start[0], view.shape[0], False),
            matrix(1, view.resized[1], view.start[1], view.shape[1], view.flipped),
        )
        for view in views
    ]

"""How a scene is shown to a segmentation model, and how its answers become one label map.

A view is what the network sees at once: the scene resized, flipped, or one window of it. Whatever
is done to the logits of a view until they are summed is linear, along the height and the width
each: they are resized to the view, placed in the scene, divided by how often a place was seen,
resized to the original size, and turned back if the view was flipped. So for each view there are
two matrices that do all of it at once: `rows @ logits @ columns.T`.

Views of one scale are summed before the softmax, scales and flips averaged after it.

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
SLIDE = 2 / 3  # of the windows' side
Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a label map is asked for; the defaults are the published protocol, at one scale.

    Args:
      scales: of the size that images are fitted into; the answers are averaged.
      flip: whether each scale is also seen from left to right.
      size_multiple: the resized sides are rounded to multiples of so many pixels, which leaves
        fewer shapes to compile; 1 is exact.
      stride_share: how far apart windows that slide over the resized image are, as a share of
        their side; 0 shows the image as a whole.

    Raises:
      ValueError: a value that cannot work, named.

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
        """From where one window begins on the resized image to where the next one does.

        Args:
          preprocessing: of the model, for the windows' side.

        Returns:
          Pixels, rounded down, along the height and the width; 0 for images that are shown whole.
        """
        return int(self.stride_share * preprocessing.window)

    def describe(self, preprocessing: ScenePreprocessing) -> str:
        """The protocol in words, with a note where it is not as published.

        Args:
          preprocessing: of the model, for the windows' side.

        Returns:
          One line: 'whole images' for the published protocol, or such as 'windows of 512 every 341
          pixels, scales 0.5, 1.0, flips', in pixels of the resized image.
        """
        stride = self.stride(preprocessing)
        windows = f"windows of {preprocessing.window} every {stride} pixels"
        parts = [windows if stride else "whole images"]
        if len(self.scales) > 1 or self.scales != (1.0,):
            parts.append(f"scales {', '.join(map(str, self.scales))}")
        if self.flip:
            parts.append("flips")
        if self.size_multiple > 1:
            parts.append(f"sides rounded to multiples of {self.size_multiple} (not as published)")
        return ", ".join(parts)


PUBLISHED = Protocol()


def make_protocol(multi_scale: bool, slide: bool, size_multiple: int | None = None) -> Protocol:
    """The protocol that a command line asks for."""
    return Protocol(
        scales=MULTI_SCALE if multi_scale else (1.0,),
        flip=multi_scale,
        size_multiple=size_multiple or 1,
        stride_share=SLIDE if slide else 0.0,
    )


class View(NamedTuple):
    """One input of the network: of the scene at `resized`, the window that begins at `start`.

    `start` is (top, left), `shape` the window's (height, width), `group` the number of the scale
    and flip.
    """

    resized: Shape
    flipped: bool
    start: Shape
    shape: Shape
    group: int


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last is shifted back inside."""
    number = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(number)]


def plan_views(
    height: int, width: int, preprocessing: ScenePreprocessing, protocol: Protocol
) -> list[View]:
    """The views of a scene of `height` by `width` pixels, by scale, flip and place."""
    views: list[View] = []
    group, stride = 0, protocol.stride(preprocessing)
    for scale in protocol.scales:
        limits = int(preprocessing.long_side * scale), int(preprocessing.short_side * scale)
        if preprocessing.long_side:
            tall, wide = resized_shape(height, width, limits)
        else:
            tall, wide = int(height * scale + 0.5), int(width * scale + 0.5)
        resized = _rounded(tall, protocol.size_multiple), _rounded(wide, protocol.size_multiple)
        window = resized
        if stride:
            most = preprocessing.window
            window = min(resized[0], most), min(resized[1], most)
        for flipped in (False, True) if protocol.flip else (False,):
            views += [
                View(resized, flipped, (top, left), window, group)
                for top in _window_starts(resized[0], window[0], stride or 1)
                for left in _window_starts(resized[1], window[1], stride or 1)
            ]
            group += 1
    return views


def _rounded(side: int, multiple: int) -> int:
    return max(round(side / multiple) * multiple, math.ceil(MIN_IMAGE_SIDE / multiple) * multiple)


def show(image: np.ndarray, views: list[View]) -> list[np.ndarray]:
    """What the network sees of `image` `[H, W, 3]` uint8 in each view, uint8."""
    resized: dict[tuple[Shape, bool], np.ndarray] = {}
    shown = []
    for view in views:
        key = view.resized, view.flipped
        if key not in resized:
            whole = image
            if view.resized != image.shape[:2]:
                whole = resize_image(image, view.resized)
            resized[key] = whole[:, ::-1] if view.flipped else whole
        (top, left), (height, width) = view.start, view.shape
        shown.append(np.ascontiguousarray(resized[key][top : top + height, left : left + width]))
    return shown


@functools.lru_cache(maxsize=256)
def bilinear_matrix(size: int, length: int) -> np.ndarray:
    """`[size, length]` float64: resizes a line, as `models.resizing.resize_bilinear` does."""
    place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    floor = np.minimum(place.astype(int), max(length - 2, 0))
    matrix = np.zeros((size, length))
    rows = np.arange(size)
    matrix[rows, floor] = 1 - (place - floor)
    if length > 1:
        matrix[rows, floor + 1] = place - floor
    return matrix


def logits_side(side: int) -> int:
    """Of the logits' map, for the side of a view: the stem's arithmetic."""
    return (side + 2 * 2 - 7) // 4 + 1


def _line(
    size: int, resized: int, start: int, window: int, starts: list[int], flipped: bool
) -> np.ndarray:
    """`[size, logits_side(window)]`: from a line of a window's logits to one of the result."""
    placed = np.zeros((resized, logits_side(window)))
    placed[start : start + window] = bilinear_matrix(window, logits_side(window))
    seen = np.zeros(resized)
    for other in starts:
        seen[other : other + window] += 1
    matrix = bilinear_matrix(size, resized) @ (placed / seen[:, None])
    return matrix[::-1] if flipped else matrix


def view_matrices(
    height: int, width: int, views: list[View]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each view, `rows` `[height, h]` and `columns` `[width, w]`, float64.

    Args:
      height: of the result.
      width: of the result.
      views: of one scene.
    """
    found: dict[tuple[int, int, int, int, bool], np.ndarray] = {}
    matrices = []
    for view in views:
        pair = []
        for axis, size in enumerate((height, width)):
            starts = sorted({o.start[axis] for o in views if o.resized == view.resized})
            start, flipped = view.start[axis], view.flipped and axis == 1
            key = axis, view.resized[axis], start, view.shape[axis], flipped
            if key not in found:
                found[key] = _line(
                    size, view.resized[axis], start, view.shape[axis], starts, flipped
                )
            pair.append(found[key])
        matrices.append((pair[0], pair[1]))
    return matrices

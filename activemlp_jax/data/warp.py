"""Random warping of images, for training on handwritten digits."""

import functools
import itertools
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

MESH = 2  # cells along each side of a warped image


@functools.lru_cache(maxsize=256)
def _mesh(width: int, height: int) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """Return cells (left, upper, right, lower), and corners [row, column, xy] minus the center."""
    xs = [width * i // MESH for i in range(MESH + 1)]
    ys = [height * i // MESH for i in range(MESH + 1)]
    cells = [
        (left, upper, right, lower)
        for upper, lower in itertools.pairwise(ys)
        for left, right in itertools.pairwise(xs)
    ]
    return cells, np.stack(np.meshgrid(xs, ys), axis=-1) - [width / 2, height / 2]


def random_warp(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Rotate, scale, shear, shift and bend an image at random.

    The image is divided into `MESH` by `MESH` cells. An affine map around the center sends each
    corner of a cell to a position in the source image, and noise added to these positions bends the
    cells. Pixels from outside the image are black.

    Args:
      image: `[H, W, 3]` uint8.
      rng: random generator; 24 numbers are drawn.
      config: the section `augment.warp`. `degrees` of rotation, `scale` (difference of a factor
        from 1), `shear` (a slope) and `translate` (a share of the side) are the limits of uniform
        draws in both directions. `bend` is the standard deviation of the noise, as a share of the
        side.

    Source: the distortions of Simard, Steinkraus and Platt, "Best practices for convolutional
    neural networks applied to visual document analysis" (2003), on a coarse mesh.
    """
    angle = math.radians(rng.uniform(-config.degrees, config.degrees))
    scale_x, scale_y = rng.uniform(1 - config.scale, 1 + config.scale, 2).tolist()
    shear = rng.uniform(-config.shear, config.shear)
    height, width = image.shape[:2]
    size = np.array([width, height])
    boxes, corners = _mesh(width, height)

    # Pillow needs the map from positions in the result to positions in the source image.
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array(
        [
            [cos / scale_x, (cos * shear - sin) / scale_y],
            [sin / scale_x, (sin * shear + cos) / scale_y],
        ]
    )
    shift = rng.uniform(-config.translate, config.translate, 2) * size
    source = (corners - shift) @ matrix.T + size / 2
    source += rng.normal(0, config.bend, source.shape) * size
    # Pillow's order of a cell's corners: upper left, lower left, lower right, upper right.
    quads = np.concatenate(
        [source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:]], axis=-1
    )
    cells = list(zip(boxes, quads.reshape(-1, 8).tolist(), strict=True))
    warped = Image.fromarray(image).transform(
        (width, height), Image.Transform.MESH, cells, Image.Resampling.BILINEAR
    )
    return np.asarray(warped)

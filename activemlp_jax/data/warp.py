"""The random warp of the digits' training images."""

import functools
import itertools
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

MESH = 2  # cells along each side of a warped image


@functools.lru_cache(maxsize=256)
def _mesh(width: int, height: int) -> tuple[list[tuple[int, int, int, int]], np.ndarray]:
    """The cells of a mesh as (left, upper, right, lower), and its corners' places [rows, columns,
    (x, y)] as seen from the centre.
    """
    xs = [width * i // MESH for i in range(MESH + 1)]
    ys = [height * i // MESH for i in range(MESH + 1)]
    cells = [
        (left, upper, right, lower)
        for upper, lower in itertools.pairwise(ys)
        for left, right in itertools.pairwise(xs)
    ]
    return cells, np.stack(np.meshgrid(xs, ys), axis=-1) - [width / 2, height / 2]


def random_warp(image: np.ndarray, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """Rotate, scale, shear, shift and bend at random; black comes in from outside.

    The image is cut into `MESH` by `MESH` cells. An affine map around the centre says where in the
    image each corner of a cell is read, and noise on the corners bends what lies between them.

    Args:
      image: `[H, W, 3]` uint8.
      rng: for 24 numbers.
      config: limits, each symmetric around no change: `degrees` of rotation, `scale` as a factor's
        distance from 1, `shear` as a slope, `translate` as a share of the side; and `bend`, the
        noise's standard deviation as a share of the side.

    Source: the distortions of Simard, Steinkraus and Platt, "Best practices for convolutional
    neural networks applied to visual document analysis" (2003), on a coarse mesh.
    """
    angle = math.radians(rng.uniform(-config.degrees, config.degrees))
    scale_x, scale_y = rng.uniform(1 - config.scale, 1 + config.scale, 2).tolist()
    shear = rng.uniform(-config.shear, config.shear)
    height, width = image.shape[:2]
    size = np.array([width, height])
    boxes, corners = _mesh(width, height)

    # From places in the result to places in the image, as Pillow wants it.
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array(
        [
            [cos / scale_x, (cos * shear - sin) / scale_y],
            [sin / scale_x, (sin * shear + cos) / scale_y],
        ]
    )
    shift = rng.uniform(-config.translate, config.translate, 2) * size
    read = (corners - shift) @ matrix.T + size / 2
    read += rng.normal(0, config.bend, read.shape) * size
    # Pillow's order of a cell's corners: upper left, lower left, lower right, upper right.
    quads = np.concatenate([read[:-1, :-1], read[1:, :-1], read[1:, 1:], read[:-1, 1:]], axis=-1)
    cells = list(zip(boxes, quads.reshape(-1, 8).tolist(), strict=True))
    warped = Image.fromarray(image).transform(
        (width, height), Image.Transform.MESH, cells, Image.Resampling.BILINEAR
    )
    return np.asarray(warped)

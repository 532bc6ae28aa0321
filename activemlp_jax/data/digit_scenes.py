"""Scenes of handwritten digits: a segmentation task that needs no download."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from activemlp_jax.data.base import Example
from activemlp_jax.data.sources import open_digits
from activemlp_jax.utils.errors import UserError

SIDE = 64
SCENES = {"train": 10_000, "test": 500}
CLASS_NAMES: tuple[str, ...] = ("background", *"0123456789")
STROKE_SIDE = 32  # of a digit as it is held, in pixels
SMALLEST, LARGEST = 26, 36  # a digit's side in a scene, in pixels
TURN = math.radians(10)
SHEAR = 0.1
ASPECT = 0.1  # the most by which a digit is wider or narrower
DARK, LIGHT = (0, 110), (90, 255)  # what the colours of a background, and of strokes, are made of
COLORS = 12  # that a digit's or a stroke's is the most distinct one of
PLACES = 20  # that a digit's is the most distant one of


@functools.cache
def _digits(split: str) -> tuple[tuple[Image.Image, int], ...]:
    """The digits of `split` as (grey picture of 32 x 32 pixels, digit)."""
    source = open_digits(split)
    images, labels = zip(*(source[index] for index in range(len(source))), strict=True)
    # Steeper from ink to paper than the upscaled 8 x 8 pixels are: no halo, and a clear border.
    inked = [np.clip(2.5 * (image[..., 0].astype(float) - 44), 0, 255) for image in images]
    pictures = [Image.fromarray(grey.astype(np.uint8)) for grey in inked]
    return tuple(zip(pictures, labels, strict=True))


class _Canvas:
    """A scene as it is painted: `image` `[SIDE, SIDE, 3]` float32 and `mask` `[SIDE, SIDE]`."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        base = rng.uniform(*DARK, 3)
        # A smooth change of colour across the scene, and noise of its own in every pixel.
        corners = np.clip(base + rng.uniform(-35, 35, (3, 3, 3)), 0, 255).astype(np.uint8)
        smooth = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noise = rng.standard_normal((SIDE, SIDE, 1), np.float32) * rng.uniform(0, 10)
        self.image = np.asarray(smooth, np.float32) + noise
        self.mask = np.zeros((SIDE, SIDE), np.uint8)
        self._colors = corners.reshape(-1, 3).astype(float)[::4]  # to keep a distance from
        self._centers = np.empty((0, 2))

    def _paint(self, alpha: np.ndarray, label: int) -> None:
        """Cover `alpha`, `[SIDE, SIDE]` uint8, of each pixel with a new colour."""
        candidates = self._rng.uniform(*LIGHT, (COLORS, 3))
        distances = np.linalg.norm(candidates[:, None] - self._colors, axis=-1).min(axis=1)
        color = candidates[distances.argmax()]
        self._colors = np.vstack([self._colors, color])
        share = alpha[..., None] * np.float32(1 / 255)
        self.image += share * (color.astype(np.float32) - self.image)
        self.mask[alpha >= 128] = label

    def add_digit(self, picture: Image.Image, digit: int) -> None:
        """Paint a digit at a place of its own, in any size, slightly turned and slanted."""
        rng = self._rng
        side = rng.uniform(SMALLEST, LARGEST)
        angle = rng.uniform(-TURN, TURN)
        places = rng.uniform(side / 2 - 2, SIDE - side / 2 + 2, (PLACES, 2))
        if len(self._centers):
            apart = np.linalg.norm(places[:, None] - self._centers, axis=-1).min(axis=1)
            center = places[apart.argmax()]
        else:
            center = places[0]
        self._centers = np.vstack([self._centers, center])
        # From a place in the scene to the place in the picture, as Pillow wants it.
        shear, aspect = rng.uniform(-SHEAR, SHEAR), rng.uniform(1 - ASPECT, 1 + ASPECT)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        slant = np.array([[1 / aspect, shear], [0, 1]])
        (a, b), (c, d) = (slant @ turn * (STROKE_SIDE / side)).tolist()
        x, y = center.tolist()
        middle = STROKE_SIDE / 2
        matrix = (a, b, middle - a * x - b * y, c, d, middle - c * x - d * y)
        alpha = picture.transform(
            (SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        self._paint(np.asarray(alpha), 1 + digit)

    def add_stroke(self, width: int) -> None:
        """Paint a line or an arc, `width` half pixels wide, that is background."""
        rng = self._rng
        fine = Image.new("L", (2 * SIDE, 2 * SIDE))  # twice as large, to have smooth edges
        draw = ImageDraw.Draw(fine)
        x, y, radius_x, radius_y = rng.uniform(
            [0, 0, SIDE / 6, SIDE / 6], [2 * SIDE, 2 * SIDE, SIDE / 2, SIDE / 2]
        ).tolist()
        start, sweep = rng.uniform([0, 60], [360, 200]).tolist()
        if rng.random() < 0.5:
            dx, dy = radius_x * math.cos(start), radius_y * math.sin(start)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=width)
        else:
            box = (x - radius_x, y - radius_y, x + radius_x, y + radius_y)
            draw.arc(box, start, start + sweep, fill=255, width=width)
        self._paint(np.asarray(fine.reduce(2)), 0)


class DigitScenes:
    """Scenes of 64 x 64 pixels with two or three handwritten digits each, on colours and noise.

    A pixel's class is the digit that it shows, or 'background'. Digits differ in size, angle and
    colour and cover each other; strokes that are background lie under and over them. A scene
    follows from its split and index alone. The digits are those of scikit-learn; the writers of
    'train' and 'test' are different people.

    Args:
      split: 'train', of 10,000 scenes, or 'test', of 500; None for 'test'.

    Raises:
      UserError: no such split.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """

    class_names = CLASS_NAMES

    def __init__(self, split: str | None = None):
        self._split = split or "test"
        if self._split not in SCENES:
            raise UserError(f"digit_scenes has the splits {', '.join(SCENES)}, not {split!r}")
        self._digits = _digits(self._split)

    def __len__(self) -> int:
        return SCENES[self._split]

    def shape(self, index: int) -> tuple[int, int]:
        """The (height, width) of every scene."""
        del index
        return SIDE, SIDE

    def image_name(self, index: int) -> str:
        """What to call the scene at `index`."""
        return f"{self._split}_{index:05}"

    def __getitem__(self, index: int) -> Example:
        """The scene at `index`: image `[64, 64, 3]` uint8, mask `[64, 64]` uint8.

        Raises:
          IndexError: no such scene.
        """
        index = range(len(self))[index]
        rng = np.random.default_rng([list(SCENES).index(self._split), index])
        canvas = _Canvas(rng)
        for _ in range(rng.integers(1, 3)):
            canvas.add_stroke(int(rng.integers(3, 9)))
        for which in rng.integers(len(self._digits), size=rng.integers(2, 4)):
            canvas.add_digit(*self._digits[which])
        for _ in range(rng.integers(0, 2)):
            canvas.add_stroke(int(rng.integers(3, 6)))
        return Example(np.clip(canvas.image, 0, 255).astype(np.uint8), canvas.mask)

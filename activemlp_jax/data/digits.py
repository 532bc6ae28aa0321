"""Handwritten digits, alone or in scenes with a mask: datasets that need no download."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from activemlp_jax.data.base import Example, Source, choose_split

SIDE = 64
SCENES = {"train": 10_000, "test": 500}
CLASS_NAMES: tuple[str, ...] = ("background", *"0123456789")
PICTURE_SIDE = 32  # side of the picture of a single digit, in pixels
MIN_DIGIT_SIDE, MAX_DIGIT_SIDE = 26, 36  # side of a digit in a scene, in pixels
MAX_ROTATION = math.radians(10)
MAX_SHEAR = 0.1
MAX_STRETCH = 0.1  # relative change of a digit's width
BACKGROUND_LEVELS, INK_LEVELS = (0, 110), (90, 255)  # ranges of each color channel
# Number of random colors to draw for a digit or stroke; it gets the one most unlike earlier ones.
COLOR_CANDIDATES = 12
# Number of random centers to draw for a digit; it gets the one farthest from earlier digits.
CENTER_CANDIDATES = 20


class ArraySource:
    """A dataset split in memory: `images` `[N, H, W, 3]` uint8 and `labels` `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self._images = images
        self._labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))


def open_digits(split: str | None) -> Source:
    """Open the 1,797 handwritten digits that come with scikit-learn, upscaled to 32 x 32 pixels.

    The split 'train' has the first 1,437 digits in the dataset's order. The split 'test', the
    default, has the last 360, which were written by other people. Any other raises UserError.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository; the copy in `sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    part = parts[choose_split(split, list(parts), "digits")]
    digits = load_digits()
    gray = np.round(digits.images[part] * (255 / 16)).astype(np.uint8)
    upscaled = [Image.fromarray(g).resize((32, 32), Image.Resampling.BICUBIC) for g in gray]
    images = np.stack([np.asarray(image.convert("RGB")) for image in upscaled])
    return ArraySource(images, digits.target[part], tuple("0123456789"))


@functools.cache
def _digits(split: str) -> tuple[tuple[Image.Image, int], ...]:
    """Load the digits of `split`, each as a gray picture of 32 x 32 pixels and its value."""
    source = open_digits(split)
    images, labels = zip(*(source[index] for index in range(len(source))), strict=True)
    # Upscaling from 8 x 8 pixels blurs the edges; more contrast sharpens them without a halo.
    inked = [np.clip(2.5 * (image[..., 0].astype(float) - 44), 0, 255) for image in images]
    pictures = [Image.fromarray(ink.astype(np.uint8)) for ink in inked]
    return tuple(zip(pictures, labels, strict=True))


def _farthest(candidates: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Choose the point of `candidates` that is farthest from its nearest neighbor in `others`."""
    distances = np.linalg.norm(candidates[:, None] - others, axis=-1)
    return candidates[distances.min(axis=1, initial=np.inf).argmax()]


class _Canvas:
    """A scene in progress: `image` `[SIDE, SIDE, 3]` float32, `mask` `[SIDE, SIDE]` uint8."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        base = rng.uniform(*BACKGROUND_LEVELS, 3)
        # A smooth color gradient across the scene, plus gray noise in every pixel.
        corners = np.clip(base + rng.uniform(-35, 35, (3, 3, 3)), 0, 255).astype(np.uint8)
        smooth = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noise = rng.standard_normal((SIDE, SIDE, 1), np.float32) * rng.uniform(0, 10)
        self.image = np.asarray(smooth, np.float32) + noise
        self.mask = np.zeros((SIDE, SIDE), np.uint8)
        self._colors = corners.reshape(-1, 3).astype(float)[::4]  # new colors differ from these
        self._centers = np.empty((0, 2))

    def _paint(self, alpha: np.ndarray, label: int) -> None:
        """Blend in a new color with opacity `alpha` `[SIDE, SIDE]` uint8, and label its pixels."""
        color = _farthest(self._rng.uniform(*INK_LEVELS, (COLOR_CANDIDATES, 3)), self._colors)
        self._colors = np.vstack([self._colors, color])
        share = alpha[..., None] * np.float32(1 / 255)
        self.image += share * (color.astype(np.float32) - self.image)
        self.mask[alpha >= 128] = label

    def add_digit(self, picture: Image.Image, digit: int) -> None:
        """Paint a digit far from earlier ones, with random size, rotation, shear and stretch."""
        rng = self._rng
        side = rng.uniform(MIN_DIGIT_SIDE, MAX_DIGIT_SIDE)
        angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
        candidates = rng.uniform(side / 2 - 2, SIDE - side / 2 + 2, (CENTER_CANDIDATES, 2))
        center = _farthest(candidates, self._centers)
        self._centers = np.vstack([self._centers, center])
        # Pillow needs the map from positions in the scene to positions in the picture.
        shear = rng.uniform(-MAX_SHEAR, MAX_SHEAR)
        stretch = rng.uniform(1 - MAX_STRETCH, 1 + MAX_STRETCH)
        rotation = np.array(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        skew = np.array([[1 / stretch, shear], [0, 1]])
        (a, b), (c, d) = (skew @ rotation * (PICTURE_SIDE / side)).tolist()
        x, y = center.tolist()
        middle = PICTURE_SIDE / 2
        matrix = (a, b, middle - a * x - b * y, c, d, middle - c * x - d * y)
        alpha = picture.transform(
            (SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        self._paint(np.asarray(alpha), 1 + digit)

    def add_stroke(self, width: int) -> None:
        """Paint a line or an arc, `width` half pixels wide, labeled as background."""
        rng = self._rng
        fine = Image.new("L", (2 * SIDE, 2 * SIDE))  # twice the size, for smooth edges
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
    """Scenes of 64 x 64 pixels with two or three handwritten digits on a colored, noisy background.

    The class of a pixel is the digit that it shows, or 'background'. Digits differ in size, angle
    and color and may overlap; strokes with the label 'background' lie under and over them. A scene
    depends only on its split and index. The digits come from scikit-learn; those of 'train' and
    'test' were written by different people.

    `split` is 'train' (10,000 scenes) or 'test' (500 scenes), the default; any other raises
    UserError. For the source, see `open_digits`.
    """

    class_names = CLASS_NAMES

    def __init__(self, split: str | None = None):
        self._split = choose_split(split, list(SCENES), "digit_scenes")
        self._digits = _digits(self._split)

    def __len__(self) -> int:
        return SCENES[self._split]

    def shape(self, index: int) -> tuple[int, int]:
        """Return the (height, width) of a scene."""
        del index
        return SIDE, SIDE

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # raises IndexError if it is out of range
        rng = np.random.default_rng([list(SCENES).index(self._split), index])
        canvas = _Canvas(rng)
        for _ in range(rng.integers(1, 3)):
            canvas.add_stroke(int(rng.integers(3, 9)))
        for which in rng.integers(len(self._digits), size=rng.integers(2, 4)):
            canvas.add_digit(*self._digits[which])
        for _ in range(rng.integers(0, 2)):
            canvas.add_stroke(int(rng.integers(3, 6)))
        return Example(np.clip(canvas.image, 0, 255).astype(np.uint8), canvas.mask)

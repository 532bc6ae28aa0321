"""Preprocessing settings: how an image becomes a model's input, without augmentation."""

import dataclasses

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.utils.json_files import short

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Limits far above what any model needs, so that a malicious model file cannot exhaust the memory.
MAX_INPUT_SIDE, MAX_SIDE = 2**12, 2**14  # pixels
MAX_FACTOR = 4
MAX_COLOR, MIN_STD = 1000, 1e-6


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images for evaluation and prediction; the defaults are the authors'.

    Args:
      image_size: side of the square input, in pixels.
      resize_factor: the short side is resized to `int(resize_factor * image_size)` pixels before
        the center is cropped.
      mean: means of red, green and blue, on a scale from 0 to 1.
      std: standard deviations of red, green and blue, on the same scale.

    Raises:
      ValueError: a value is invalid; the message names it.

    Source: the evaluation code of the authors' release.
    """

    image_size: int = 224
    resize_factor: float = 256 / 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_side("image_size", self.image_size, MIN_IMAGE_SIDE, MAX_INPUT_SIDE)
        factor = self.resize_factor
        if not _is_number(factor) or not factor >= 1:
            raise ValueError(f"resize_factor is {short(factor)}, expected 1 or more")
        if factor > MAX_FACTOR:
            raise ValueError(f"resize_factor is {short(factor)}, expected at most {MAX_FACTOR}")
        _check_colors(self.mean, self.std)

    @property
    def side(self) -> int:
        """Side of the model's square input, in pixels."""
        return self.image_size

    def with_side(self, side: int) -> "Preprocessing":
        """Return the same preprocessing with another `side`."""
        return dataclasses.replace(self, image_size=side)

    def describe(self) -> str:
        """Describe the size to which images are resized."""
        return f"images of {self.image_size} pixels"


@dataclasses.dataclass(frozen=True)
class ScenePreprocessing:
    """Preprocessing of images for segmentation; the defaults are the authors'.

    An image is resized to the largest size that fits into `long_side` by `short_side` pixels and
    keeps its aspect ratio.

    Args:
      long_side: maximum of the long side, in pixels; 0 leaves images at their size.
      short_side: maximum of the short side, in pixels.
      window: side of the windows of sliding-window inference, in pixels; also the side of the crops
        in training.
      mean: see `Preprocessing`.
      std: see `Preprocessing`.

    Raises:
      ValueError: a value is invalid; the message names it.

    Source: the test pipeline of the authors' release.
    """

    long_side: int = 2048
    short_side: int = 512
    window: int = 512
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_side("short_side", self.short_side, MIN_IMAGE_SIDE, MAX_SIDE)
        _check_side("window", self.window, MIN_IMAGE_SIDE, MAX_INPUT_SIDE)
        if type(self.long_side) is not int or self.long_side:
            _check_side("long_side", self.long_side, self.short_side, MAX_SIDE, "0 or ")
        _check_colors(self.mean, self.std)

    @property
    def side(self) -> int:
        """Side of the windows, in pixels."""
        return self.window

    def with_side(self, side: int) -> "ScenePreprocessing":
        """Return the same preprocessing with another `side`."""
        return dataclasses.replace(self, window=side)

    def describe(self) -> str:
        """Describe the size to which images are resized."""
        if not self.long_side:
            return "images as large as they are"
        return f"images resized into {self.long_side} x {self.short_side} pixels"


def _check_side(name: str, value: object, low: int, high: int, other: str = "") -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"{name} is {short(value)}, expected {other}at least {low}")
    if value > high:
        raise ValueError(f"{name} is {short(value)}, expected at most {high:,}")


def _check_colors(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(f"{name} is {short(values)}, expected three numbers")
    if not all(_is_number(value) and abs(value) <= MAX_COLOR for value in mean):
        raise ValueError(f"mean is {short(mean)}, expected three numbers up to {MAX_COLOR}")
    if not all(_is_number(value) and MIN_STD <= value <= MAX_COLOR for value in std):
        raise ValueError(
            f"std is {short(std)}, expected three numbers above 0, from {MIN_STD} to {MAX_COLOR}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

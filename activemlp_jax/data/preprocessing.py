"""How an image becomes a model's input when nothing is random."""

import dataclasses

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.utils.json_files import short

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# More than any model is made for, and little enough that a file which asks for more costs nothing.
MOST_INPUT_SIDE, MOST_SIDE = 2**12, 2**14  # pixels
MOST_FACTOR = 4
MOST_COLOR, LEAST_STD = 1000, 1e-6


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What evaluation and prediction do to an image; the defaults are the original's.

    Args:
      image_size: side of the square input, in pixels.
      resize_factor: the short side is resized to `int(resize_factor * image_size)`; of that the
        centre is cut out.
      mean: of red, green and blue, of the range 0 to 1.
      std: the same.

    Raises:
      ValueError: a value that cannot work, named.

    Source: the evaluation of the authors' release.
    """

    image_size: int = 224
    resize_factor: float = 256 / 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_side("image_size", self.image_size, MIN_IMAGE_SIDE, MOST_INPUT_SIDE)
        factor = self.resize_factor
        if not _is_number(factor) or not factor >= 1:
            raise ValueError(f"resize_factor is {short(factor)}, expected 1 or more")
        if factor > MOST_FACTOR:
            raise ValueError(f"resize_factor is {short(factor)}, expected at most {MOST_FACTOR}")
        _check_colors(self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class ScenePreprocessing:
    """What segmentation does to an image when nothing is random; the defaults are the original's.

    Args:
      long_side: an image is resized to the largest that fits into `long_side` by `short_side`, in
        pixels, with its ratio kept; 0 leaves it as it is.
      short_side: the same.
      window: side of the windows that can be slid over it: of the crops that were trained on.
      mean: of red, green and blue, of the range 0 to 1.
      std: the same.

    Raises:
      ValueError: a value that cannot work, named.

    Source: the test pipeline of the authors' release.
    """

    long_side: int = 2048
    short_side: int = 512
    window: int = 512
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _check_side("short_side", self.short_side, MIN_IMAGE_SIDE, MOST_SIDE)
        _check_side("window", self.window, MIN_IMAGE_SIDE, MOST_INPUT_SIDE)
        if type(self.long_side) is not int or self.long_side:
            _check_side("long_side", self.long_side, self.short_side, MOST_SIDE, "0 or ")
        _check_colors(self.mean, self.std)


def _check_side(name: str, value: object, least: int, most: int, other: str = "") -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {short(value)}, expected {other}at least {least}")
    if value > most:
        raise ValueError(f"{name} is {short(value)}, expected at most {most:,}")


def _check_colors(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(f"{name} is {short(values)}, expected three numbers")
    if not all(_is_number(value) and abs(value) <= MOST_COLOR for value in mean):
        raise ValueError(f"mean is {short(mean)}, expected three numbers up to {MOST_COLOR}")
    if not all(_is_number(value) and LEAST_STD <= value <= MOST_COLOR for value in std):
        raise ValueError(
            f"std is {short(std)}, expected three numbers above 0, from {LEAST_STD} to {MOST_COLOR}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

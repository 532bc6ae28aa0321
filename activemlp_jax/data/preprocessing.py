"""How an image becomes a model's input when nothing is random."""

import dataclasses
import math

from activemlp_jax.models.backbone import MIN_IMAGE_SIDE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        size, factor = self.image_size, self.resize_factor
        if type(size) is not int or size < MIN_IMAGE_SIDE:
            raise ValueError(f"image_size is {size!r}, expected at least {MIN_IMAGE_SIDE}")
        if not _is_number(factor) or factor < 1:
            raise ValueError(f"resize_factor is {factor!r}, expected 1 or more")
        _check_colours(self.mean, self.std)


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
        for name, least in (("short_side", MIN_IMAGE_SIDE), ("window", MIN_IMAGE_SIDE)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, expected at least {least}")
        long_side, least = self.long_side, self.short_side
        if type(long_side) is not int or (long_side and long_side < least):
            raise ValueError(f"long_side is {long_side!r}, expected 0 or at least {least}")
        _check_colours(self.mean, self.std)


def _check_colours(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if len(mean) != 3 or not all(map(_is_number, mean)):
        raise ValueError(f"mean is {mean!r}, expected three numbers")
    if len(std) != 3 or not all(_is_number(value) and value > 0 for value in std):
        raise ValueError(f"std is {std!r}, expected three numbers above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

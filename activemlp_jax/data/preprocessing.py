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
        if len(self.mean) != 3 or not all(map(_is_number, self.mean)):
            raise ValueError(f"mean is {self.mean!r}, expected three numbers")
        if len(self.std) != 3 or not all(_is_number(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std!r}, expected three numbers above 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

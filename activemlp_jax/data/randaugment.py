"""RandAugment on Pillow images, as in the authors' recipe.

A string such as 'rand-m9-mstd0.5-inc1' describes a policy; see `parse_randaugment`.

Source: E. D. Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced
search space" (2020), in the variant of timm's `rand_augment_transform`, which the authors' release
uses.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)  # color of pixels from outside the image: ImageNet's mean
MAX_MAGNITUDE = 10.0  # upper end of the scale of magnitudes

Picture = Image.Image
Enhancer = Callable[[Picture], ImageEnhance._Enhance]


def _affine(picture: Picture, *matrix: float) -> Picture:
    transform, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return picture.transform(picture.size, transform, matrix, bicubic, fillcolor=FILL)


def _posterize(picture: Picture, bits: float) -> Picture:
    if bits == 0:  # Pillow refuses to remove all bits
        return Image.new("RGB", picture.size)
    return ImageOps.posterize(picture, int(bits))


def _solarize(picture: Picture, threshold: float) -> Picture:
    return ImageOps.solarize(picture, int(threshold))


def _solarize_add(picture: Picture, added: float) -> Picture:
    table = [min(255, value + int(added)) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _enhance(kind: Enhancer) -> Callable[[Picture, float], Picture]:
    return lambda picture, factor: kind(picture).enhance(factor)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on pictures, `apply(picture, level)`.

    `level` computes the level from the magnitude as a share of `MAX_MAGNITUDE`. The caller negates
    the magnitude of a `signed` operation with probability 1/2.
    """

    apply: Callable[[Picture, float], Picture]
    level: Callable[[float], float] = lambda share: share  # the operation may ignore it
    signed: bool = False

    def __call__(self, picture: Picture, magnitude: float) -> Picture:
        """Apply the operation to an RGB picture; `magnitude` is up to 10, from -10 if `signed`."""
        return self.apply(picture, self.level(magnitude / MAX_MAGNITUDE))


def _scaled(factor: float) -> Callable[[float], float]:
    return lambda share: share * factor


SHARED: dict[str, Operation] = {
    "AutoContrast": Operation(lambda picture, _: ImageOps.autocontrast(picture)),
    "Equalize": Operation(lambda picture, _: ImageOps.equalize(picture)),
    "Invert": Operation(lambda picture, _: ImageOps.invert(picture)),
    "Rotate": Operation(
        lambda picture, degrees: picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL),
        _scaled(30.0),
        signed=True,
    ),
    "SolarizeAdd": Operation(_solarize_add, lambda share: min(128, int(share * 110))),
    "ShearX": Operation(
        lambda picture, slope: _affine(picture, 1, slope, 0, 0, 1, 0), _scaled(0.3), signed=True
    ),
    "ShearY": Operation(
        lambda picture, slope: _affine(picture, 1, 0, 0, slope, 1, 0), _scaled(0.3), signed=True
    ),
    "TranslateX": Operation(
        lambda picture, share: _affine(picture, 1, 0, share * picture.width, 0, 1, 0),
        _scaled(0.45),
        signed=True,
    ),
    "TranslateY": Operation(
        lambda picture, share: _affine(picture, 1, 0, 0, 0, 1, share * picture.height),
        _scaled(0.45),
        signed=True,
    ),
}

ENHANCERS: dict[str, Enhancer] = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}

# 'inc1': a larger magnitude means a stronger operation.
INCREASING: dict[str, Operation] = {
    **SHARED,
    "Posterize": Operation(_posterize, lambda share: 4 - int(share * 4)),
    "Solarize": Operation(_solarize, lambda share: 256 - int(share * 256)),
    **{
        name: Operation(_enhance(kind), lambda share: 1.0 + share * 0.9, signed=True)
        for name, kind in ENHANCERS.items()
    },
}

# 'inc0': a larger magnitude weakens some operations, as in the original AutoAugment.
NOT_INCREASING: dict[str, Operation] = {
    **SHARED,
    "Posterize": Operation(_posterize, lambda share: int(share * 4)),
    "Solarize": Operation(_solarize, lambda share: int(share * 256)),
    **{
        name: Operation(_enhance(kind), lambda share: share * 1.8 + 0.1)
        for name, kind in ENHANCERS.items()
    },
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A policy that draws `num_ops` operations per picture, with replacement, and applies them.

    Args:
      magnitude: mean of the magnitudes, 0 to 10.
      num_ops: number of operations.
      magnitude_std: standard deviation of the normally distributed magnitudes; if infinite,
        magnitudes are uniform from 0 to `magnitude`.
      max_magnitude: magnitudes are clipped to this maximum.
      probability: probability that a drawn operation is applied.
      increasing: whether all operations get stronger with the magnitude.
    """

    magnitude: float = 10.0
    num_ops: int = 2
    magnitude_std: float = 0.0
    max_magnitude: float = MAX_MAGNITUDE
    probability: float = 0.5
    increasing: bool = False

    @property
    def operations(self) -> dict[str, Operation]:
        """The operations to draw from, by name."""
        return INCREASING if self.increasing else NOT_INCREASING

    def draw_magnitude(self, rng: np.random.Generator) -> float:
        """Draw an unsigned magnitude, 0 to `max_magnitude`."""
        if math.isinf(self.magnitude_std):
            magnitude = rng.uniform(0, self.magnitude)
        else:
            magnitude = rng.normal(self.magnitude, self.magnitude_std)
        return min(max(magnitude, 0.0), self.max_magnitude)

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Picture:
        """Apply `num_ops` random operations to an RGB picture, each with `probability`."""
        operations = list(self.operations.values())
        for choice in rng.integers(len(operations), size=self.num_ops):
            if rng.random() >= self.probability:
                continue
            operation = operations[choice]
            magnitude = self.draw_magnitude(rng)
            if operation.signed and rng.random() < 0.5:
                magnitude = -magnitude
            picture = operation(picture, magnitude)
        return picture


SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(inf|\d+(?:\.\d+)?)")


@functools.cache
def parse_randaugment(policy: str) -> RandAugment:
    """Parse the description of a policy, such as 'rand-m9-mstd0.5-inc1'.

    A description is 'rand', followed by sections in any order, separated by '-'. A section is a
    name and a number. Each of these sections is optional:

      m: magnitude, 0 to 10; default 10.
      n: number of operations per picture, up to 15; default 2.
      mstd: standard deviation of the magnitude; default 0. With 'inf', magnitudes are uniform from
        0 to m.
      mmax: maximum to which magnitudes are clipped, 0 to 10; default 10.
      p: probability of each operation, 0 to 1; default 0.5.
      inc: 1 if all operations get stronger with the magnitude; default 0.

    Raises:
      ValueError: the description is malformed, or a value is out of range; the message names
        the section.
    """
    head, *sections = policy.split("-")
    if head != "rand":
        raise ValueError(f"{policy!r} is not a policy, expected rand-m9-mstd0.5-inc1 or the like")
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "mmax": 10.0, "p": 0.5, "inc": 0.0}
    given: set[str] = set()
    for section in sections:
        match = SECTION.fullmatch(section)
        if match is None or match[1] in given:
            raise ValueError(
                f"{policy!r} has the section {section!r}, expected m, n, mstd, mmax, p or inc "
                "with a number, each once"
            )
        given.add(match[1])
        values[match[1]] = float(match[2])
    for name, high in (("m", 10), ("mmax", 10), ("p", 1), ("n", 15)):
        if values[name] > high:
            raise ValueError(f"{policy!r} has {name} {values[name]:g}, expected 0 to {high}")
    if not values["n"].is_integer() or values["inc"] not in (0, 1):
        raise ValueError(f"{policy!r}: expected a whole n, and inc 0 or 1")
    return RandAugment(
        magnitude=values["m"],
        num_ops=int(values["n"]),
        magnitude_std=values["mstd"],
        max_magnitude=values["mmax"],
        probability=values["p"],
        increasing=values["inc"] == 1,
    )

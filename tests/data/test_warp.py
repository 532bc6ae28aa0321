"""Random warping of the digits."""

from typing import Any

import numpy as np
import pytest

from activemlp_jax.data.warp import random_warp
from activemlp_jax.training.config import default_config


def warp(**limits: float) -> Any:
    settings = default_config().augment.warp
    for key, value in limits.items():
        settings[key] = value
    return settings


def blob(x: int, y: int) -> np.ndarray:
    image = np.zeros((33, 33, 3), np.uint8)
    image[y - 1 : y + 2, x - 1 : x + 2] = 255
    return image


def centre_of_mass(image: np.ndarray) -> tuple[float, float]:
    gray = image[..., 0] / image[..., 0].sum()
    y, x = np.mgrid[:33, :33]
    return float((gray * x).sum() - 16), float((gray * y).sum() - 16)


def test_warp_without_limits_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (33, 31, 3), np.uint8)
    np.testing.assert_array_equal(random_warp(image, np.random.default_rng(0), warp()), image)


def test_warp_turns_around_the_centre_by_at_most_the_given_angle():
    angles = []
    for seed in range(200):
        turned = random_warp(blob(26, 16), np.random.default_rng(seed), warp(degrees=30.0))
        x, y = centre_of_mass(turned)
        assert abs(np.hypot(x, y) - 10) < 0.3
        angles.append(np.degrees(np.arctan2(y, x)))
    assert -30.5 < min(angles) < -27
    assert 27 < max(angles) < 30.5


@pytest.mark.parametrize(
    ("limits", "start", "axis", "extremes"),
    [
        ({"translate": 0.2}, (16, 16), "x", (-0.2 * 33, 0.2 * 33)),
        ({"translate": 0.2}, (16, 16), "y", (-0.2 * 33, 0.2 * 33)),
        ({"scale": 0.25}, (26, 16), "x", (7.5, 12.5)),
        ({"scale": 0.25}, (16, 26), "y", (7.5, 12.5)),
        ({"shear": 0.3}, (16, 26), "x", (-3, 3)),
    ],
)
def test_warp_shifts_scales_and_shears_up_to_the_limits(
    limits: dict[str, float], start: tuple[int, int], axis: str, extremes: tuple[float, float]
):
    rng = np.random.default_rng(0)
    moved = [
        centre_of_mass(random_warp(blob(*start), rng, warp(**limits)))["xy".index(axis)]
        for _ in range(200)
    ]
    least, most = extremes
    tenth = (most - least) / 10
    assert least - 0.3 < min(moved) < least + tenth
    assert most - tenth < max(moved) < most + 0.3


def test_warp_bends_by_a_little_and_never_the_same_way():
    shifts = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x, y = centre_of_mass(random_warp(blob(16, 16), rng, warp(bend=0.04)))
        shifts += [x, y]
    # The center of the image is a corner of four cells, so it moves by the noise itself.
    assert np.std(shifts) == pytest.approx(0.04 * 33, rel=0.2)
    assert abs(np.mean(shifts)) < 0.3

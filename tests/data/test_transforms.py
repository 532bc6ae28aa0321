"""Transforms of single images: evaluation as the original's, and the random warp."""

from typing import Any

import goldens
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.transforms import eval_transform, random_warp
from activemlp_jax.training.config import default_config


@pytest.mark.parametrize(("photo", "size"), [("china", 224), ("flower", 384)])
def test_evaluation_transform_equals_the_original_pixel_for_pixel(photo: str, size: int):
    golden = goldens.load("eval_transform.npz")
    ours = eval_transform(load_sample_image(f"{photo}.jpg"), Preprocessing(image_size=size))
    assert (ours.shape, ours.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(ours[::7, ::7], golden[f"{photo}_{size}"])
    means = ours.reshape(-1, 3).mean(0)
    np.testing.assert_allclose(means, golden[f"{photo}_{size}_mean"], rtol=1e-12)


@pytest.mark.parametrize("shape", [(33, 200), (200, 33), (1, 1), (300, 300), (1, 3000)])
@pytest.mark.parametrize("factor", [1.0, 256 / 224])
def test_evaluation_transform_gives_a_square_of_any_image(shape: tuple[int, int], factor: float):
    image = np.full((*shape, 3), 77, np.uint8)
    ours = eval_transform(image, Preprocessing(image_size=48, resize_factor=factor))
    np.testing.assert_array_equal(ours, np.full((48, 48, 3), 77))


def test_evaluation_transform_leaves_an_image_of_the_right_size_alone():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    preprocessing = Preprocessing(image_size=32, resize_factor=1.0)
    np.testing.assert_array_equal(eval_transform(image, preprocessing), image)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 31}, "image_size is 31, expected at least 32"),
        ({"image_size": 224.0}, r"image_size is 224\.0"),
        ({"resize_factor": 0.9}, r"resize_factor is 0\.9, expected 1 or more"),
        ({"mean": (0.5, 0.5)}, "mean is .*expected three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std is .*expected three numbers above 0"),
    ],
)
def test_preprocessing_that_cannot_work_is_named(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)


def warp(**limits: float) -> Any:
    settings = default_config().data.warp
    for key, value in limits.items():
        settings[key] = value
    return settings


def blob(x: int, y: int) -> np.ndarray:
    image = np.zeros((33, 33, 3), np.uint8)
    image[y - 1 : y + 2, x - 1 : x + 2] = 255
    return image


def centre_of_mass(image: np.ndarray) -> tuple[float, float]:
    grey = image[..., 0] / image[..., 0].sum()
    y, x = np.mgrid[:33, :33]
    return float((grey * x).sum() - 16), float((grey * y).sum() - 16)


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
    # The centre of the image is a corner of four cells, so it moves by the noise itself.
    assert np.std(shifts) == pytest.approx(0.04 * 33, rel=0.2)
    assert abs(np.mean(shifts)) < 0.3

"""Transforms of single images for training and evaluation, compared with the original's."""

from typing import Any

import goldens
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import stats
from sklearn.datasets import load_sample_image

from activemlp_jax.data.image_transforms import (
    augmented_crop,
    color_jitter,
    draw_crop,
    eval_transform,
)
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.training.config import default_config

DRAWS = 4000
LOG_RATIO = np.log(4 / 3)


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


def settings(**changes: Any) -> Any:
    """Return a config for images of 48 x 48 pixels, with `changes` to `config.augment`."""
    config = default_config()
    config.data.image_size = 48
    config.augment.update_from_flattened_dict(changes)
    return config


def draw_crops(width: int, height: int) -> np.ndarray:
    """Draw `DRAWS` crops, and return rows of (left, top, width, height)."""
    rng = np.random.default_rng(1)
    crop = settings().augment.crop
    return np.array([draw_crop(rng, width, height, crop) for _ in range(DRAWS)])


def accepted_area_cdf(area: np.ndarray) -> np.ndarray:
    """Compute the CDF of the areas of crops, as shares of a square, if the crop fits into it.

    A ratio r fits with the area a if a * max(r, 1 / r) <= 1, so the density at a is that share of
    the log-uniform ratios: min(1, -log(a) / log(4 / 3)).
    """
    grid = np.linspace(0.08, 1, 100_001)
    density = np.minimum(1, -np.log(grid) / LOG_RATIO)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(grid)
    below = np.concatenate([[0], np.cumsum(steps)])
    return np.interp(area, grid, below / below[-1])


def test_areas_of_crops_are_uniform_among_those_that_fit():
    boxes = draw_crops(5000, 5000)
    result = stats.kstest(boxes[:, 2] * boxes[:, 3] / 5000**2, accepted_area_cdf)
    assert result.pvalue > 0.01, result


def test_ratios_of_crops_are_log_uniform_among_those_that_fit():
    boxes = draw_crops(5000, 5000)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 5000**2, boxes[:, 2] / boxes[:, 3]
    widest = np.minimum(LOG_RATIO, -np.log(area))
    result = stats.kstest(np.log(ratio) / widest, stats.uniform(-1, 2).cdf)
    assert result.pvalue > 0.01, result


@pytest.mark.parametrize("axis", [0, 1])
def test_crops_lie_anywhere_inside(axis: int):
    boxes = draw_crops(500, 375)
    free = (500, 375)[axis] - boxes[:, 2 + axis]
    assert (boxes[:, axis] >= 0).all()
    assert (boxes[:, axis] <= free).all()
    spread = np.random.default_rng(0).random(DRAWS)  # makes whole pixels continuous
    result = stats.kstest((boxes[:, axis] + spread) / (free + 1), "uniform")
    assert result.pvalue > 0.01, result


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 10), (493, 0, 13, 10)),  # no crop fits, so the ratio is the largest, 4/3
        ((10, 1000), (0, 493, 10, 13)),  # or the smallest, 3/4
        ((1, 1), (0, 0, 1, 1)),
        ((1, 3000), (0, 1499, 1, 1)),
    ],
)
def test_where_no_crop_fits_it_is_the_largest_in_the_centre(
    size: tuple[int, int], expected: tuple[int, int, int, int]
):
    crop = settings(**{"crop.min_area": 0.9}).augment.crop
    assert draw_crop(np.random.default_rng(0), *size, crop) == expected


def test_training_crops_then_resizes_then_flips():
    image = load_sample_image("china.jpg")
    expected_rng = np.random.default_rng(7)
    box = draw_crop(expected_rng, 640, 427, settings().augment.crop)
    part = Image.fromarray(image).crop(
        (box.left, box.top, box.left + box.width, box.top + box.height)
    )
    expected = np.asarray(part.resize((48, 48), Image.Resampling.BICUBIC))
    kept = augmented_crop(image, np.random.default_rng(7), settings(flip=0.0))
    flipped = augmented_crop(image, np.random.default_rng(7), settings(flip=1.0))
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(flipped, expected[:, ::-1])


def test_half_of_the_training_images_are_flipped():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    whole = settings(**{"crop.min_area": 1.0, "crop.min_ratio": 1.0, "crop.max_ratio": 1.0})
    rng = np.random.default_rng(0)
    flips = sum(augmented_crop(image, rng, whole)[0, 0, 0] > 128 for _ in range(1000))
    assert stats.binomtest(int(flips), 1000, 0.5).pvalue > 0.01, flips


def test_color_jitter_changes_brightness_contrast_and_saturation_in_any_order():
    image = Image.fromarray(load_sample_image("flower.jpg")[::8, ::8])
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = set()
    for _ in range(100):
        jittered = color_jitter(image, rng, 0.4)
        order = tuple(int(which) for which in same.permutation(3))
        orders.add(order)
        expected = image
        for which in order:
            factor = same.uniform(0.6, 1.4)
            expected = kinds[which](expected).enhance(factor)
        assert jittered.tobytes() == expected.tobytes()
    assert len(orders) == 6


def test_color_jitter_is_used_only_without_randaugment():
    image = load_sample_image("flower.jpg")[:60, :60]

    def augmented(**changes: Any) -> np.ndarray:
        return augmented_crop(image, np.random.default_rng(0), settings(**changes))

    plain = augmented()
    assert (augmented(color_jitter=0.4) != plain).any()
    policy = {"rand_augment": "rand-m9-n0"}  # nothing is drawn
    np.testing.assert_array_equal(augmented(color_jitter=0.4, **policy), plain)

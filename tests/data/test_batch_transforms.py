"""Erasing and mixing on the device, compared with the original's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from activemlp_jax.data.batch_transforms import (
    Boxes,
    Mixing,
    draw_erasing_boxes,
    draw_mixing,
    mix,
    random_erasing,
)

DRAWS = 4000
SIDE = 4096  # so large that rounding to pixels does not show
LOG_RATIO = np.log(1 / 0.3)


def sides(boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    top, bottom, left, right = map(np.asarray, boxes)
    return bottom - top, right - left


def drawn_mixing(count: int, height: int = 224, width: int = 224, **changes: float) -> Mixing:
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_probability": 0.5} | changes
    return draw_mixing(jax.random.key(5), count, height, width, **settings)


def fits_cdf(area: np.ndarray) -> np.ndarray:
    """Compute the CDF of erased areas, as shares of a square, if the box is smaller.

    A ratio r fits with the area a if a * max(r, 1 / r) < 1. Ratios are log-uniform.
    """
    grid = np.linspace(0.02, 1 / 3, 100_001)
    density = np.minimum(1, -np.log(grid) / LOG_RATIO)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(area, grid, below / below[-1])


def test_erased_areas_are_uniform_among_those_that_fit():
    heights, widths = sides(draw_erasing_boxes(jax.random.key(0), DRAWS, SIDE, SIDE))
    result = stats.kstest(heights * widths / SIDE**2, fits_cdf)
    assert result.pvalue > 0.01, result


def test_erased_ratios_are_log_uniform_among_those_that_fit():
    heights, widths = sides(draw_erasing_boxes(jax.random.key(1), DRAWS, SIDE, SIDE))
    widest = np.minimum(LOG_RATIO, -np.log(heights * widths / SIDE**2))
    result = stats.kstest(np.log(heights / widths) / widest, stats.uniform(-1, 2).cdf)
    assert result.pvalue > 0.01, result


@pytest.mark.parametrize("axis", [0, 1])
def test_erased_boxes_lie_anywhere_inside_and_are_smaller_than_the_image(axis: int):
    boxes = draw_erasing_boxes(jax.random.key(2), DRAWS, 224, 160)
    side, first = sides(boxes)[axis], np.asarray((boxes.top, boxes.left)[axis])
    free = (224, 160)[axis] - side
    assert side.min() > 0
    assert (first >= 0).all()
    assert (free > 0).all()
    assert (first <= free).all()
    spread = np.random.default_rng(0).random(DRAWS)  # makes whole pixels continuous
    result = stats.kstest((first + spread) / (free + 1), "uniform")
    assert result.pvalue > 0.01, result


def test_a_quarter_of_the_images_is_erased_in_one_box_of_standard_normal_noise():
    images = jnp.full((2000, 32, 32, 3), 7.0)
    erased = np.asarray(jax.jit(random_erasing, static_argnums=2)(jax.random.key(3), images, 0.25))
    changed = (erased != 7).any(-1)
    count = int(changed.any((1, 2)).sum())
    assert stats.binomtest(count, 2000, 0.25).pvalue > 0.01, count
    for image in changed[changed.any((1, 2))]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert image.sum() == len(rows) * len(columns), "one box"
        assert np.ptp(rows) == len(rows) - 1
        assert np.ptp(columns) == len(columns) - 1
    noise = erased[changed]
    result = stats.kstest(noise[:20000].reshape(-1), "norm")
    assert result.pvalue > 0.01, result
    correlation = np.corrcoef(noise.T)  # each channel has different noise
    assert np.abs(correlation - np.eye(3)).max() < 0.01


def test_an_image_that_no_box_fits_in_is_left_alone():
    heights, widths = sides(draw_erasing_boxes(jax.random.key(0), 50, 1, 1))
    assert not heights.any()
    assert not widths.any()


def test_mixup_shares_follow_their_beta_distribution():
    mixing = drawn_mixing(2 * DRAWS)
    shares = np.asarray(mixing.weight)[~np.asarray(mixing.is_cutmix)]
    result = stats.kstest(shares, stats.beta(0.8, 0.8).cdf)
    assert result.pvalue > 0.01, result


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_cutmix_is_drawn_with_its_probability(probability: float):
    count = int(drawn_mixing(DRAWS, cutmix_probability=probability).is_cutmix.sum())
    assert stats.binomtest(count, DRAWS, probability).pvalue > 0.01, count


@pytest.mark.parametrize(("off", "is_cutmix"), [("cutmix_alpha", False), ("mixup_alpha", True)])
def test_a_kind_without_alpha_is_never_drawn(off: str, is_cutmix: bool):
    assert (drawn_mixing(100, **{off: 0.0}).is_cutmix == is_cutmix).all()


def test_cutmix_boxes_follow_the_formula():
    """Sides are int(side * sqrt(1 - lambda)); lambda and centers are uniform; boxes are clipped."""
    height, width = 30, 20
    rng = np.random.default_rng(0)
    share = rng.random(200_000)
    half = [(side * np.sqrt(1 - share)).astype(int) // 2 for side in (height, width)]
    center = [rng.integers(side, size=len(share)) for side in (height, width)]
    expected = [
        (np.maximum(c - h, 0), np.minimum(c + h, side))
        for c, h, side in zip(center, half, (height, width), strict=True)
    ]
    mixing = drawn_mixing(20_000, height, width)
    box = np.stack(mixing.box)
    ours = [(box[0], box[1]), (box[2], box[3])]
    for side, our_pair, pair in zip((height, width), ours, expected, strict=True):
        # Compare the count of each possible (first, last) pair with its frequency in the formula.
        codes = [low * (side + 1) + high for low, high in (our_pair, pair)]
        values, frequency = np.unique(codes[1], return_counts=True)
        assert np.isin(codes[0], values).all(), "a box that the formula cannot give"
        observed = np.array([(codes[0] == value).sum() for value in values])
        common = frequency > 100
        result = stats.chi2_contingency(
            [
                [*observed[common], observed[~common].sum() + 1],
                [*frequency[common], frequency[~common].sum() + 1],
            ]
        )
        assert result.pvalue > 0.01, result.pvalue


def test_cutmix_corrects_its_share_to_the_area_that_is_left():
    mixing = drawn_mixing(DRAWS, 30, 20)
    heights, widths = sides(mixing.box)
    is_cutmix = np.asarray(mixing.is_cutmix)
    expected = 1 - heights * widths / (30 * 20)
    np.testing.assert_allclose(mixing.weight[is_cutmix], expected[is_cutmix], rtol=1e-6)


def test_each_group_is_mixed_with_itself_in_reverse():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 4, 5, 3)).astype(np.float32)
    targets = rng.random((6, 7)).astype(np.float32)
    mixing = Mixing(
        weight=jnp.array([0.25, 0.9]),
        is_cutmix=jnp.array([False, True]),
        box=Boxes(*(jnp.array([0, side]) for side in (1, 3, 2, 5))),
    )
    mixed, mixed_targets = jax.jit(mix)(images, targets, mixing)
    expected, expected_targets = images.copy(), targets.copy()
    for row in range(3):
        expected[row] = 0.25 * images[row] + 0.75 * images[2 - row]
        expected_targets[row] = 0.25 * targets[row] + 0.75 * targets[2 - row]
        expected[3 + row, 1:3, 2:5] = images[5 - row, 1:3, 2:5]
        expected_targets[3 + row] = 0.9 * targets[3 + row] + 0.1 * targets[5 - row]
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mixed_targets, expected_targets, rtol=1e-6)

"""RandAugment: operations that equal the original's pixel for pixel, and the policy's draws."""

import itertools
from collections import Counter

import goldens
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from activemlp_jax.data.randaugment import (
    INCREASING,
    NOT_INCREASING,
    RandAugment,
    parse_randaugment,
)

RECIPE = "rand-m9-mstd0.5-inc1"
GOLDEN = goldens.load("randaugment.npz")
MAGNITUDES = ("0", "2.5", "9", "10")


def golden_name(name: str) -> str:
    """Return the name that the goldens use for the operation `name`."""
    if name.startswith("Translate"):
        return f"{name}Rel"
    return name if f"{name}/0/pos" in GOLDEN else f"{name}Increasing"


@pytest.mark.parametrize(
    ("name", "magnitude", "sign"),
    list(itertools.product(INCREASING, MAGNITUDES, ("pos", "neg"))),
)
def test_every_operation_equals_the_original_pixel_for_pixel(name: str, magnitude: str, sign: str):
    operation = INCREASING[name]
    negative = sign == "neg" and operation.signed
    value = -float(magnitude) if negative else float(magnitude)
    ours = np.asarray(operation(Image.fromarray(GOLDEN["photo"]), value))
    golden = GOLDEN[f"{golden_name(name)}/{magnitude}/{sign}"]
    different = (ours != golden).any(-1).sum()
    assert different == 0, f"{different} of {48 * 64} pixels differ"


def test_there_are_fifteen_operations_and_a_golden_for_each():
    assert len(INCREASING) == len(NOT_INCREASING) == 15
    names = {key.split("/")[0] for key in GOLDEN if key != "photo"}
    assert {golden_name(name) for name in INCREASING} == names


@pytest.mark.parametrize("name", sorted({"Posterize", "Solarize"}))
def test_without_inc_some_operations_shrink_as_the_magnitude_grows(name: str):
    photo = Image.fromarray(GOLDEN["photo"])
    # Without inc, m keeps int(0.4 m) bits or values below int(25.6 m), as 10 - m does with inc.
    for magnitude in (0.0, 2.5, 5.0, 10.0):
        ours = NOT_INCREASING[name](photo, magnitude)
        assert ours.tobytes() == INCREASING[name](photo, 10 - magnitude).tobytes()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RECIPE, RandAugment(9, 2, 0.5, 10, 0.5, True)),
        ("rand", RandAugment(10, 2, 0, 10, 0.5, False)),
        ("rand-n3-m7-p1-mmax8-mstdinf-inc0", RandAugment(7, 3, float("inf"), 8, 1.0, False)),
        ("rand-inc1-mstd1.25-m6.5", RandAugment(6.5, 2, 1.25, 10, 0.5, True)),
    ],
)
def test_policies_are_read_from_strings(policy: str, expected: RandAugment):
    assert parse_randaugment(policy) == expected


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("augmix-m3", "is not a policy, expected rand-m9"),
        ("rand-x4", "the section 'x4', expected m, n"),
        ("rand-m", "the section 'm', expected"),
        ("rand-m9-m8", "the section 'm8', expected .* each once"),
        ("rand-m-9", "the section 'm'"),
        ("rand-m11", "m 11, expected 0 to 10"),
        ("rand-p2", "p 2, expected 0 to 1"),
        ("rand-minf", "m inf, expected 0 to 10"),
        ("rand-n1.5", "a whole n"),
        ("rand-inc2", "inc 0 or 1"),
    ],
)
def test_a_wrong_policy_is_named(policy: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_randaugment(policy)


def draws(count: int) -> list[list[tuple[str, float]]]:
    """Apply the recipe to `count` pictures; return each one's operations and magnitudes."""
    policy = parse_randaugment(RECIPE)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(GOLDEN["photo"][:2, :2])
    applied: list[list[tuple[str, float]]] = []

    class Recorded(RandAugment):
        @property
        def operations(self):
            return {name: recorder(name) for name in INCREASING}

    def recorder(name: str):
        def record(picture: Image.Image, magnitude: float) -> Image.Image:
            applied[-1].append((name, magnitude))
            return picture

        record.signed = INCREASING[name].signed
        return record

    recorded = Recorded(**vars(policy))
    for _ in range(count):
        applied.append([])
        recorded(picture, rng)
    return applied


def test_two_operations_are_drawn_and_each_applied_half_of_the_time():
    numbers = Counter(map(len, draws(4000)))
    found = [numbers[0], numbers[1], numbers[2]]
    assert sum(found) == 4000
    result = stats.chisquare(found, [1000, 2000, 1000])
    assert result.pvalue > 0.01, (found, result)


def test_all_operations_are_drawn_equally_often_and_again_after_themselves():
    pictures = draws(15000)
    names = Counter(name for picture in pictures for name, _ in picture)
    result = stats.chisquare([names[name] for name in INCREASING])
    assert result.pvalue > 0.01, (names, result)
    pairs = [picture for picture in pictures if len(picture) == 2]
    twice = sum(first[0] == second[0] for first, second in pairs)
    assert stats.binomtest(twice, len(pairs), 1 / 15).pvalue > 0.01, (twice, len(pairs))


def test_magnitudes_are_normal_around_nine_and_clipped_at_ten():
    magnitudes = np.array([abs(value) for picture in draws(6000) for _, value in picture])
    assert magnitudes.max() == 10
    clipped = int((magnitudes == 10).sum())
    assert stats.binomtest(clipped, len(magnitudes), stats.norm.sf(2)).pvalue > 0.01, clipped
    inside = magnitudes[magnitudes < 10]
    result = stats.kstest(inside, stats.truncnorm(-np.inf, 2, 9, 0.5).cdf)
    assert result.pvalue > 0.01, result


def test_signs_are_a_fair_coin_where_an_operation_has_one():
    signs = {True: Counter(), False: Counter()}
    for picture in draws(6000):
        for name, value in picture:
            signs[INCREASING[name].signed][value < 0] += 1
    assert signs[False][True] == 0
    negative, positive = signs[True][True], signs[True][False]
    assert stats.binomtest(negative, negative + positive).pvalue > 0.01, signs


def test_an_infinite_deviation_draws_magnitudes_uniformly_up_to_m():
    policy = parse_randaugment("rand-m8-mstdinf")
    rng = np.random.default_rng(0)
    magnitudes = [policy.draw_magnitude(rng) for _ in range(4000)]
    result = stats.kstest(magnitudes, stats.uniform(0, 8).cdf)
    assert result.pvalue > 0.01, result


def test_a_picture_of_one_pixel_passes_every_operation():
    picture = Image.fromarray(GOLDEN["photo"][:1, :1])
    for operation in INCREASING.values():
        for magnitude in (-10.0, 0.0, 10.0) if operation.signed else (0.0, 10.0):
            assert operation(picture, magnitude).size == (1, 1)

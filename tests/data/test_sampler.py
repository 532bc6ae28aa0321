"""The order of a run's samples: shuffling, and repeated augmentation as in the original."""

import numpy as np
import pytest

from activemlp_jax.data.sampler import SampleOrder
from activemlp_jax.utils.errors import UserError


def order(examples: int = 1000, batch: int = 24, repeats: int = 3, groups: int = 4) -> SampleOrder:
    return SampleOrder(examples, batch, repeats, groups, seed=0)


def epoch_examples(samples: SampleOrder, epoch: int = 0) -> np.ndarray:
    """Return the examples of an epoch in the order of its samples."""
    length = samples.steps_per_epoch * samples.batch_size
    images = np.arange(length) // samples.repeats
    return np.array([samples.example(epoch, int(image)) for image in images])


@pytest.mark.parametrize(
    ("examples", "batch", "repeats", "steps"),
    [
        (1_281_167, 1024, 3, 1251),  # 1251 batches have 1,281,024 samples
        (1_281_167, 1000, 3, 1281),
        (1_281_167, 1024, 1, 1251),
        (1000, 24, 3, 768 // 24),  # cut to a multiple of 256
        (1000, 24, 1, 1000 // 24),
        (255, 24, 3, 255 // 24),  # too small to be cut
        (256, 256, 3, 1),
    ],
)
def test_an_epoch_of_repeated_augmentation_is_cut_as_the_originals(
    examples: int, batch: int, repeats: int, steps: int
):
    assert order(examples, batch, repeats, groups=1).steps_per_epoch == steps


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_each_image_stands_so_many_times_in_a_row(repeats: int):
    seen = epoch_examples(order(repeats=repeats))
    rows = seen[: len(seen) // repeats * repeats].reshape(-1, repeats)
    assert (rows == rows[:, :1]).all()
    assert len(set(rows[:, 0])) == len(rows), "no image comes back within an epoch"


def test_every_epoch_shuffles_the_whole_set_anew():
    samples = order()
    seen = [set(epoch_examples(samples, epoch)) for epoch in range(60)]
    assert set.union(*seen) == set(range(1000))
    orders = {tuple(epoch_examples(samples, epoch)) for epoch in range(24)}
    assert len(orders) == 24


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_samples_are_dealt_round_robin_over_the_groups(groups: int):
    samples = order(groups=groups)
    rows = [samples.row(place) for place in range(24)]
    assert sorted(rows) == list(range(24))
    size = 24 // groups
    assert [row // size for row in rows] == [place % groups for place in range(24)]
    assert [row % size for row in rows] == [place // groups for place in range(24)]


def test_copies_of_an_image_meet_different_partners():
    samples = order(batch=24, groups=4)
    partner = {}
    for place in range(24):
        group, index = divmod(samples.row(place), 6)
        partner[place] = group * 6 + 5 - index
    place_of = {samples.row(place): place for place in range(24)}
    for image in range(8):
        partners = {place_of[partner[3 * image + copy]] // 3 for copy in range(3)}
        assert image not in partners
        rows = {partner[3 * image + copy] for copy in range(3)}
        assert len(rows) == 3


def test_a_batch_larger_than_an_epoch_is_refused():
    with pytest.raises(UserError, match=r"config\.batch_size is 54, .* has only 53 images; .*=13$"):
        order(53, batch=54, repeats=1, groups=1)
    with pytest.raises(UserError, match=r"batch_size is 512, but an epoch .* has only 256 images"):
        order(500, batch=512, repeats=3, groups=4)

"""Batches are a pure function of seed and step: any workers, any hosts, any restart."""

import contextlib
from typing import Any

import numpy as np
import pytest

from activemlp_jax.data.pipeline import Batch, eval_batches, steps_per_epoch, train_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import ArraySource
from activemlp_jax.errors import UserError
from activemlp_jax.training.config import default_config

EXAMPLES = 53
BATCH = 8
EPOCH = EXAMPLES // BATCH
EVALUATION = Preprocessing(image_size=32, resize_factor=1.0)


def config(**changes: Any) -> Any:
    config = default_config()
    config.batch_size = BATCH
    config.data.warp.degrees = 20.0
    config.data.warp.translate = 0.1
    config.update_from_flattened_dict(changes)
    return config


def source() -> ArraySource:
    """Every example has its index as label."""
    images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8)
    return ArraySource(images, np.arange(EXAMPLES), tuple(map(str, range(EXAMPLES))))


def batches(first: int = 0, last: int = 3 * EPOCH, hosts: Any = (0, 1), **changes: Any) -> Any:
    process, processes = hosts
    iterator = train_batches(
        source(), config(**changes), first_step=first, last_step=last,
        process=process, processes=processes,
    )  # fmt: skip
    with contextlib.closing(iterator):
        return list(iterator)


def assert_same(ours: list[Batch], expected: list[Batch]) -> None:
    assert len(ours) == len(expected)
    for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=f"{key} of step {step}")


def test_batches_are_uint8_images_and_int32_labels():
    batch = batches(last=1)[0]
    assert batch["image"].shape == (BATCH, 32, 32, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32


def test_an_epoch_visits_examples_once_each_and_in_another_order_the_next_time():
    labels = np.stack([batch["label"] for batch in batches()]).reshape(3, -1)
    for epoch in labels:
        assert len(set(epoch)) == EPOCH * BATCH
    assert len({tuple(epoch) for epoch in labels}) == 3


def test_every_example_is_left_out_by_some_epoch_only():
    labels = [batch["label"] for batch in batches(last=12 * EPOCH)]
    assert set(np.concatenate(labels)) == set(range(EXAMPLES))


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_the_number_of_threads_changes_nothing(threads: int):
    assert_same(batches(**{"data.num_threads": threads}), batches(**{"data.num_threads": 3}))


def test_a_resumed_run_gets_the_batches_it_would_have_got():
    uninterrupted = batches()
    for step in range(3 * EPOCH):
        assert_same(batches(first=step), uninterrupted[step:])


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_hold_disjoint_blocks_of_the_same_global_batch(processes: int):
    parts = [batches(hosts=(process, processes)) for process in range(processes)]
    joined = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, batches())


def test_another_seed_gives_another_order_and_other_transforms():
    ours, other = batches(last=EPOCH), batches(last=EPOCH, seed=1)
    assert (ours[0]["label"] != other[0]["label"]).any()
    image_of = [
        {
            label: image
            for batch in run
            for label, image in zip(batch["label"], batch["image"], strict=True)
        }
        for run in (ours, other)
    ]
    both = image_of[0].keys() & image_of[1].keys()
    assert len(both) > EXAMPLES // 2
    assert all((image_of[0][label] != image_of[1][label]).any() for label in both)


def test_the_same_example_is_transformed_anew_each_epoch():
    seen = [
        batch["image"][row]
        for batch in batches(last=8 * EPOCH)
        for row in np.flatnonzero(batch["label"] == 7)
    ]
    assert len({image.tobytes() for image in seen}) == len(seen) > 4


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_every_example_once_on_any_number_of_hosts(processes: int):
    counted: list[int] = []
    steps = set()
    for process in range(processes):
        with contextlib.closing(
            eval_batches(
                source(), EVALUATION, BATCH, num_threads=2, process=process, processes=processes
            )
        ) as iterator:
            host = list(iterator)
        steps.add(len(host))
        for batch in host:
            assert batch["mask"].shape == (BATCH // processes,)
            counted += list(batch["label"][batch["mask"] == 1])
    assert sorted(counted) == list(range(EXAMPLES))
    assert steps == {7}, "all hosts take the same number of steps"


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(UserError, match="batch_size is 54, but the training set has only 53"):
        steps_per_epoch(source(), 54)

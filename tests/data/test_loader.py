"""Batches are a pure function of seed and step, with any workers, hosts and restarts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax._src.lib import _jax
from kills import shared_memory
from processes import free_address

from activemlp_jax.data import loader
from activemlp_jax.data.base import Example
from activemlp_jax.data.decoding import BrokenImageError
from activemlp_jax.data.digits import ArraySource
from activemlp_jax.data.loader import Batch, Skipped, eval_batches, train_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.config import FREE_TO_CHANGE, default_config
from activemlp_jax.utils.errors import UserError

EXAMPLES = 53
BATCH = 8
EPOCH = EXAMPLES // BATCH
EVALUATION = Preprocessing(image_size=32, resize_factor=1.0)


def config(**changes: Any) -> Any:
    config = default_config()
    config.batch_size = BATCH
    config.augment.warp.degrees = 20.0
    config.augment.warp.translate = 0.1
    config.augment.mix_group_size = 4
    config.update_from_flattened_dict(changes)
    return config


def source() -> ArraySource:
    """Make a source in which the label of every example is its index."""
    images = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8)
    return ArraySource(images, np.arange(EXAMPLES), tuple(map(str, range(EXAMPLES))))


RECIPE = {
    "augment.mixup_alpha": 0.8,  # turns on mixing groups
    "augment.repeats": 3,
    "augment.policy": "random_resized_crop",
    "augment.rand_augment": "rand-m9-mstd0.5-inc1",
}
TRANSFORM = Classification.transform
# A program that does not parse absl flags.
PROGRAM = """
import sys
from activemlp_jax.data.loader import train_batches
from activemlp_jax.data.sources import open_source
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.config import default_config

if __name__ == "__main__":
    config = default_config()
    config.batch_size, config.data.num_workers = 8, 2
    batches = train_batches(
        open_source("digits", "train"), Classification.transform, config,
        first_step=0, last_step=1000,
    )
    for _ in range(4):
        next(batches)
    print("ready", flush=True)
    sys.stdin.read()
"""
ORDERS = pytest.mark.parametrize("order", [{}, RECIPE], ids=["plain", "recipe"])


def batches(
    first: int = 0,
    last: int = 3 * EPOCH,
    hosts: Any = (0, 1),
    data: Any = None,
    skipped: Skipped | None = None,
    **changes: Any,
) -> Any:
    process, processes = hosts
    iterator = train_batches(
        data or source(), TRANSFORM, config(**changes), first_step=first, last_step=last,
        process=process, processes=processes, skipped=skipped,
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


@ORDERS
@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_the_number_of_threads_changes_nothing(threads: int, order: dict[str, Any]):
    ours = batches(**order, **{"data.num_threads": threads})
    assert_same(ours, batches(**order, **{"data.num_threads": 3}))


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers: int, order: dict[str, Any]):
    ours = batches(**order, **{"data.num_workers": workers})
    assert_same(ours, batches(**order, **{"data.num_threads": 0}))


def children(process: int) -> list[int]:
    """List the child processes that any thread of `process` has started."""
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_and_their_shared_memory_end_with_a_run_that_is_killed(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "ready\n"
        workers = children(run.pid)
        assert len(workers) >= 2
        segments = shared_memory([Path(f"/proc/{process}") for process in (run.pid, *workers)])
        assert segments, "batches are handed over in shared memory"
        run.kill()
        said = run.stderr.read()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        running = [worker for worker in workers if is_running(worker)]
        left = {segment for segment in segments if segment.exists()}
        if not running and not left:
            break
        time.sleep(0.1)
    for worker in running:
        os.kill(worker, signal.SIGKILL)
    assert (running, left, said) == ([], set(), "")


@ORDERS
def test_a_resumed_run_gets_the_batches_it_would_have_got(order: dict[str, Any]):
    last = 10 * EPOCH
    uninterrupted = batches(last=last, **order)
    for step in np.random.default_rng(0).choice(last, size=50, replace=False):
        assert_same(batches(int(step), last, **order), uninterrupted[step:])


@ORDERS
@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_hold_disjoint_blocks_of_the_same_global_batch(processes: int, order: dict[str, Any]):
    parts = [batches(hosts=(process, processes), **order) for process in range(processes)]
    joined = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, batches(**order))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_union_of_all_hosts_is_every_sample_of_an_epoch_once(processes: int):
    """Labels are indices. With repeats, each occurs three times, except where the epoch is cut."""
    parts = [
        batches(last=EPOCH, hosts=(process, processes), **RECIPE) for process in range(processes)
    ]
    labels = np.concatenate([batch["label"] for part in parts for batch in part])
    _, counts = np.unique(labels, return_counts=True)
    assert sorted(counts) == [3] * (EPOCH * BATCH // 3) + [EPOCH * BATCH % 3] * bool(
        EPOCH * BATCH % 3
    )


def test_the_three_copies_of_repeated_augmentation_differ():
    by_label: dict[int, list[bytes]] = {}
    for batch in batches(last=EPOCH, **RECIPE):
        for label, image in zip(batch["label"], batch["image"], strict=True):
            by_label.setdefault(int(label), []).append(image.tobytes())
    triples = [images for images in by_label.values() if len(images) == 3]
    assert len(triples) == EPOCH * BATCH // 3
    assert all(len(set(images)) == 3 for images in triples)


def test_copies_on_one_host_are_read_once(monkeypatch: pytest.MonkeyPatch):
    reads = []
    read = loader.read_unbroken
    monkeypatch.setattr(loader, "read_unbroken", lambda *args: reads.append(args[1]) or read(*args))
    batches(last=3, **RECIPE)  # 24 samples of 8 images; two of them straddle two steps
    assert len(set(reads)) == 8
    assert len(reads) == 10


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


class BrokenSource:
    """A `source()` whose examples with indices in `broken` raise `error`."""

    def __init__(self, broken: set[int], error: type[UserError] = BrokenImageError):
        self._source = source()
        self._broken = broken
        self._error = error
        self.class_names = self._source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        if index in self._broken:
            raise self._error(f"{index}.jpg is not a readable image: test")
        return self._source[index]


BROKEN = BrokenSource({7, 8, 52})


@pytest.mark.parametrize("threads", [0, 2])
def test_broken_images_are_replaced_by_the_next_index_and_counted_once(threads: int):
    said: list[str] = []
    skipped = Skipped(5, said.append)
    changes = {"data": BROKEN, "skipped": skipped, "data.num_threads": threads}
    ours, plain = (
        np.concatenate([batch["label"] for batch in batches(last=20 * EPOCH, **keywords)])
        for keywords in (changes, {})
    )
    replacement = {7: 9, 8: 9, 52: 0}
    np.testing.assert_array_equal(ours, [replacement.get(label, label) for label in plain])
    assert len(skipped) == 3
    assert sorted(said) == [
        f"skipped: {index}.jpg is not a readable image: test" for index in (52, 7, 8)
    ]


@pytest.mark.slow
def test_broken_images_are_counted_across_worker_processes():
    skipped = Skipped(5, lambda _: None)
    batches(last=6 * EPOCH, data=BROKEN, skipped=skipped, **{"data.num_workers": 2})
    assert len(skipped) == 3


@pytest.fixture
def stores() -> Iterator[list[Any]]:
    """Yield the clients of two hosts of JAX's coordination service."""
    address = free_address()
    service = _jax.get_distributed_runtime_service(address, 2)
    clients = [
        _jax.get_distributed_runtime_client(address, host, shutdown_on_destruction=False)
        for host in range(2)
    ]
    with ThreadPoolExecutor(2) as hosts:
        list(hosts.map(lambda client: client.connect(), clients))
        yield clients
        list(hosts.map(lambda client: client.shutdown(), clients))
    service.shutdown()


def train_on_two_hosts(counts: list[Skipped]) -> None:
    """Load epochs in which many images have copies on both hosts."""
    for process, skipped in enumerate(counts):
        batches(last=12 * EPOCH, hosts=(process, 2), data=BROKEN, skipped=skipped, **RECIPE)


def test_a_broken_image_that_two_hosts_read_is_counted_once(stores: list[Any]):
    said: list[str] = []
    alone = [Skipped(3, lambda _: None) for _ in range(2)]
    train_on_two_hosts(alone)
    assert sum(map(len, alone)) == 6, "both hosts read all of them"
    together = [Skipped(3, said.append, store) for store in stores]
    train_on_two_hosts(together)
    assert sum(map(len, together)) == 3
    assert len(set(said)) == len(said) == 3


def test_broken_images_are_limited_over_all_hosts_together(stores: list[Any]):
    first, second = (Skipped(2, lambda _: None, store) for store in stores)
    first.add(7, "7.jpg")
    second.add(7, "7.jpg")
    second.add(8, "8.jpg")
    with pytest.raises(UserError, match=r"^3 images cannot be read, more than .*= 2; the last: 52"):
        first.add(52, "52.jpg")


def test_names_of_broken_images_are_made_fit_for_a_terminal():
    said: list[str] = []
    Skipped(2, said.append).add(7, "\x1b]0;title\x07a\n.jpg cannot be read")
    assert said == ["skipped: ?]0;title?a .jpg cannot be read"]


def test_more_broken_images_than_allowed_stop_the_run():
    with pytest.raises(UserError, match=r"3 images cannot be read, more than .*max_skipped = 2"):
        batches(last=20 * EPOCH, data=BROKEN, skipped=Skipped(2, lambda _: None))


def test_a_set_of_broken_images_alone_ends_with_the_last_one():
    with pytest.raises(BrokenImageError, match=r"\.jpg is not a readable image"):
        batches(data=BrokenSource(set(range(EXAMPLES))))


def test_a_broken_image_is_raised_where_the_config_says_so():
    with pytest.raises(BrokenImageError, match=r"7\.jpg is not a readable image: test"):
        batches(data=BrokenSource({7}), last=2 * EPOCH, **{"data.on_error": "raise"})


def test_a_broken_mask_is_raised_though_broken_images_are_skipped():
    """A broken mask raises a UserError that is not a BrokenImageError, so it is not skipped."""
    with pytest.raises(UserError, match=r"7\.jpg"):
        batches(data=BrokenSource({7}, UserError), last=2 * EPOCH)


def test_evaluation_always_raises_a_broken_image():
    iterator = eval_batches(BrokenSource({7}), EVALUATION, BATCH, num_threads=2)
    with contextlib.closing(iterator), pytest.raises(BrokenImageError, match=r"7\.jpg"):
        list(iterator)


def test_a_worker_count_is_no_part_of_what_a_run_computes():
    free = {"data.num_threads", "data.num_workers", "data.on_error", "data.max_skipped"}
    assert free < set(FREE_TO_CHANGE)

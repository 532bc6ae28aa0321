"""Data loaders; the batch of a step is a pure function of the seed and the step.

A sample's position in the run alone decides which example is read and which random numbers change
it, so that neither the number of workers, nor that of hosts, nor a restart in between alters a
batch; a run resumes from its step number.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from ml_collections import ConfigDict

from activemlp_jax.data.base import Example, Source
from activemlp_jax.data.batch_transforms import group_size
from activemlp_jax.data.decoding import BrokenImageError
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sampler import SampleOrder
from activemlp_jax.utils.errors import UserError, one_line

Batch = dict[str, np.ndarray]
Transform = Callable[[Example, np.random.Generator, ConfigDict], Batch]

BATCHES_AHEAD = 2

# Python's resource tracker removes the shared memory of a run that ends abruptly. Without this
# option it also warns about it, after the line that says why the run ended.
QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"

# Keys of the store that all hosts share: one for each broken image, and their number.
SKIPPED, SKIPPED_COUNT = "activemlp/skipped/", "activemlp/images_skipped"


class Sample(NamedTuple):
    """One row of a host's part of a batch: each of its arrays by name."""

    row: int
    arrays: dict[str, np.ndarray]


class Unit(NamedTuple):
    """What one reading of an example gives: all its samples of one step on one host.

    `skipped` has the indices of examples that were broken, and why.
    """

    samples: list[Sample]
    skipped: list[tuple[int, str]]


class Skipped:
    """Counts the images that training could not read, each once, whichever hosts read it.

    Its length is the number of those that this host was the first to report, so that the sum over
    all hosts is the number of broken images.

    Args:
      limit: the most of them to put up with, on all hosts together.
      say: told of each of them once.
      store: that all hosts share, of `jax.distributed`; None for a single host.
    """

    def __init__(self, limit: int, say: Callable[[str], None], store: Any = None):
        self._limit = limit
        self._say = say
        self._store = store
        self._seen: set[int] = set()
        self._first = 0

    def __len__(self) -> int:
        return self._first

    def add(self, index: int, reason: str) -> None:
        """Count the example `index`; raises UserError where that is one too many."""
        if index in self._seen:
            return
        self._seen.add(index)
        if self._store is None:
            total = len(self._seen)
        elif not _set_once(self._store, f"{SKIPPED}{index}"):
            return
        else:
            total = self._store.key_value_increment(SKIPPED_COUNT, 1)
        self._first += 1
        if total > self._limit:
            raise UserError(
                f"{total} images cannot be read, more than config.data.max_skipped = "
                f"{self._limit}; the last: {reason}"
            )
        self._say(f"skipped: {one_line(reason)}")


def _set_once(store: Any, key: str) -> bool:
    """Set a key of a store that hosts share; False if it has been set."""
    try:
        store.key_value_set(key, "")
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


def sample_order(config: ConfigDict, examples: int) -> SampleOrder:
    """The order of a run's samples; `config` is the whole config."""
    groups = config.batch_size // group_size(config)
    return SampleOrder(examples, config.batch_size, config.data.repeats, groups, config.seed)


def read_unbroken(source: Source, index: int, most: int) -> tuple[Example, list[tuple[int, str]]]:
    """The example at `index`, or the first after it that can be read, and those that cannot.

    Raises:
      BrokenImageError: more than `most` in a row.
    """
    skipped: list[tuple[int, str]] = []
    while True:
        place = (index + len(skipped)) % len(source)
        try:
            return source[place], skipped
        except BrokenImageError as error:
            if len(skipped) >= min(most, len(source) - 1):
                raise
            skipped.append((place, str(error)))


def train_units(
    source: Source, transform: Transform, config: ConfigDict, process: int, processes: int
) -> tuple[Callable[[int], Unit], int]:
    """The function from an index to a unit, and the number of units a step.

    Repeats of an example within a step make one unit, so that it is read and decoded once.
    """
    order = sample_order(config, len(source))
    data, batch_size, repeats = config.data, config.batch_size, config.data.repeats
    local_batch = batch_size // processes
    units_per_step = (batch_size + repeats - 2) // repeats + 1  # a row of copies may straddle two
    most_skipped = data.max_skipped if data.on_error == "skip" else 0

    def unit(index: int) -> Unit:
        step, number = divmod(index, units_per_step)
        epoch, first = order.place(step * batch_size)
        image = first // repeats + number
        places = range(max(first, image * repeats), min(first + batch_size, (image + 1) * repeats))
        rows = {place: order.row(place - first) - process * local_batch for place in places}
        rows = {place: row for place, row in rows.items() if 0 <= row < local_batch}
        if not rows:
            return Unit([], [])
        example, skipped = read_unbroken(source, order.example(epoch, image), most_skipped)
        samples = []
        for place, row in rows.items():
            rng = np.random.default_rng([config.seed, step * batch_size + place - first])
            samples.append(Sample(row, transform(example, rng, data)))
        return Unit(samples, skipped)

    return unit, units_per_step


def _assemble(units: Sequence[Unit]) -> dict[str, Any]:
    """A host's part of a batch from its units, and what they skipped."""
    samples = [sample for unit in units for sample in unit.samples]
    samples.sort(key=lambda sample: sample.row)
    batch: dict[str, Any] = {
        name: np.stack([sample.arrays[name] for sample in samples]) for name in samples[0].arrays
    }
    batch["skipped"] = [skip for unit in units for skip in unit.skipped]
    return batch


def _end_with_parent(worker: int, workers: int) -> None:
    """Have this worker process end when the process that started it has ended, even if killed.

    Otherwise it would wait forever to hand over its batches. With the last worker, Python's
    resource tracker ends, too, and removes the shared memory that they were in.
    """
    del worker, workers
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has been started by another process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def iterate(
    elements: grain.MapDataset,
    group: int,
    assemble: Callable[[Sequence[Any]], Any],
    num_threads: int,
    num_workers: int = 0,
) -> Iterator[Any]:
    """`elements`, joined by `assemble` in groups of `group`, in order.

    Threads share the elements of a group; a worker process makes whole groups, as handing over
    many small things between processes would cost more.
    """
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads some for its workers
            flags.FLAGS.mark_as_parsed()
        if QUIET_TRACKER not in sys.warnoptions:  # child processes inherit these options
            sys.warnoptions.append(QUIET_TRACKER)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        batches = elements.batch(group, batch_fn=assemble).to_iter_dataset(options)
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=BATCHES_AHEAD)
        return iter(batches.mp_prefetch(workers, _end_with_parent))
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(16, 4 * num_threads)
    )
    batches = elements.to_iter_dataset(options).batch(group, batch_fn=assemble)
    if num_threads:
        batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(batches)


def train_batches(
    source: Source,
    transform: Transform,
    config: ConfigDict,
    *,
    first_step: int,
    last_step: int,
    process: int = 0,
    processes: int = 1,
    skipped: Skipped | None = None,
) -> Generator[Batch]:
    """This host's part of the batches of the steps `first_step` to `last_step - 1`.

    Args:
      source: the training set.
      transform: from an example, random numbers and `config.data` to the arrays of a sample.
      config: the whole config; `seed`, `batch_size` (global), `mix.group_size` and `data` are
        read.
      first_step: the first to give; a resumed run passes the step it is at.
      last_step: where to end.
      process: this host's number among `processes`, which divides the batch size.
      processes: the number of hosts.
      skipped: told which images could not be read, where `config.data.on_error` is 'skip'.

    Yields:
      The arrays of `transform`, `batch_size / processes` of each stacked. Close the iterator to end
      its threads and processes.

    Raises:
      BrokenImageError: an image that cannot be read, where `config.data.on_error` is 'raise'.
    """
    unit, units_per_step = train_units(source, transform, config, process, processes)
    elements = grain.MapDataset.range(first_step * units_per_step, last_step * units_per_step)
    data = config.data
    iterator: Any = iterate(
        elements.map(unit), units_per_step, _assemble, data.num_threads, data.num_workers
    )
    with contextlib.closing(iterator):
        for batch in iterator:
            for index, reason in batch.pop("skipped"):
                if skipped is not None:
                    skipped.add(index, reason)
            yield batch


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    num_threads: int,
    process: int = 0,
    processes: int = 1,
) -> Generator[Batch]:
    """This host's part of one ordered pass; every example counts exactly once.

    Hosts hold consecutive blocks of every global batch.

    Args:
      source: the set to evaluate on.
      preprocessing: of each image; normalising is left to the device.
      batch_size: over all hosts.
      num_threads: that read and transform; 0 for none but the caller's.
      process: this host's number among `processes`, which divides the batch size.
      processes: the number of hosts.

    Yields:
      `image` `[B, S, S, 3]` uint8, `label` `[B]` int32, and `mask` `[B]` float32: 1 for an example,
      0 for the padding that fills the last batch, so that all hosts take the same number of steps.

    Raises:
      BrokenImageError: an image that cannot be read.
    """
    local_batch = batch_size // processes
    steps = -(-len(source) // batch_size)

    def sample(index: int) -> dict[str, Any]:
        step, row = divmod(index, local_batch)
        position = (step * processes + process) * local_batch + row
        example = source[min(position, len(source) - 1)]
        return {
            "image": eval_transform(example.image, preprocessing),
            "label": np.int32(example.label),
            "mask": np.float32(position < len(source)),
        }

    def stack(samples: Sequence[dict[str, Any]]) -> Batch:
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}

    elements = grain.MapDataset.range(steps * local_batch).map(sample)
    iterator: Any = iterate(elements, local_batch, stack, num_threads)
    with contextlib.closing(iterator):
        yield from iterator

"""Data loaders for training and evaluation.

The batch of a training step is a pure function of the seed and the step: a sample's position in
the run alone determines which example is read and which random numbers augment it. Batches
therefore do not depend on the number of workers or hosts or on restarts, and a run needs only its
step number to resume.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from operator import itemgetter
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

# When a run ends abruptly, Python's resource tracker frees the shared memory that the run left
# behind, and warns about it. These warnings would follow the one line that says why the run ended.
QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"

# Keys in the store that all hosts share: the prefix of one key per broken image, and the counter
# of broken images.
SKIPPED_PREFIX, SKIPPED_COUNT = "activemlp/skipped/", "activemlp/images_skipped"


def stack(samples: Sequence[Batch]) -> Batch:
    """Stack samples, each a dict of arrays by name, into a batch."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


class ExampleSamples(NamedTuple):
    """All samples that a host makes from one example in a step.

    `samples` has pairs: a row in this host's part of the batch, and arrays. `skipped` has the index
    of each broken example that was tried before this one, and the reason.
    """

    samples: list[tuple[int, Batch]]
    skipped: list[tuple[int, str]]


class Skipped:
    """Counter of images that training could not read; an image that several hosts read counts once.

    Its length is the number of images that this host was the first to report, so the sum over all
    hosts is the number of broken images.

    Args:
      limit: the maximum number of broken images on all hosts together.
      say: called with a message for each broken image, on the host that reports it first.
      store: the key-value store of `jax.distributed` that all hosts share; None for a single host.
    """

    def __init__(self, limit: int, say: Callable[[str], None], store: Any = None):
        self._limit = limit
        self._say = say
        self._store = store
        self._seen: set[int] = set()
        self._reported = 0

    def __len__(self) -> int:
        return self._reported

    def add(self, index: int, reason: str) -> None:
        """Count the example at `index` as broken; raise UserError if that exceeds the limit."""
        if index in self._seen:
            return
        self._seen.add(index)
        if self._store and not _set_once(self._store, f"{SKIPPED_PREFIX}{index}"):
            return
        self._reported += 1
        total = self._reported
        if self._store:
            total = self._store.key_value_increment(SKIPPED_COUNT, 1)
        if total > self._limit:
            raise UserError(
                f"{total} images cannot be read, more than config.data.max_skipped = "
                f"{self._limit}; the last: {reason}"
            )
        self._say(f"skipped: {one_line(reason)}")


def _set_once(store: Any, key: str) -> bool:
    """Set a key of the shared store; return False if it was set before."""
    try:
        store.key_value_set(key, "")
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


def sample_order(config: ConfigDict, examples: int) -> SampleOrder:
    """Create a run's `SampleOrder` from the whole config and the dataset's number of examples."""
    groups = config.batch_size // group_size(config)
    return SampleOrder(examples, config.batch_size, config.augment.repeats, groups, config.seed)


def read_unbroken(
    source: Source, index: int, max_skipped: int
) -> tuple[Example, list[tuple[int, str]]]:
    """Read the example at `index` or, if it is broken, the next one that is not.

    Return the example, and the index and reason of each broken one before it. Raise
    BrokenImageError if more than `max_skipped` examples in a row, or all of them, are broken.
    """
    skipped: list[tuple[int, str]] = []
    while True:
        current = (index + len(skipped)) % len(source)
        try:
            return source[current], skipped
        except BrokenImageError as error:
            if len(skipped) >= min(max_skipped, len(source) - 1):
                raise
            skipped.append((current, str(error)))


def example_reader(
    source: Source, transform: Transform, config: ConfigDict, process: int, processes: int
) -> tuple[Callable[[int], ExampleSamples], int]:
    """Make a function that reads an example and makes this host's samples of it for one step.

    A host thus reads and decodes an example only once per step, even with several samples of it.
    The argument of the function is an index that counts the examples of all steps. Return the
    function, and the number of indices per step.
    """
    order = sample_order(config, len(source))
    data, batch_size, repeats = config.data, config.batch_size, config.augment.repeats
    local_batch = batch_size // processes
    # The most examples in a batch: the repeats of one may be split between two steps.
    examples_per_step = (batch_size + repeats - 2) // repeats + 1
    max_skipped = data.max_skipped if data.on_error == "skip" else 0

    def read(index: int) -> ExampleSamples:
        step, number = divmod(index, examples_per_step)
        epoch, start = order.place(step * batch_size)
        stop = start + batch_size
        image = start // repeats + number
        # Offsets count samples from the start of the epoch.
        offsets = range(max(start, image * repeats), min(stop, (image + 1) * repeats))
        rows = {offset: order.row(offset - start) - process * local_batch for offset in offsets}
        rows = {offset: row for offset, row in rows.items() if 0 <= row < local_batch}
        if not rows:
            return ExampleSamples([], [])
        example, skipped = read_unbroken(source, order.example(epoch, image), max_skipped)
        samples = []
        for offset, row in rows.items():
            rng = np.random.default_rng([config.seed, step * batch_size + offset - start])
            samples.append((row, transform(example, rng, config)))
        return ExampleSamples(samples, skipped)

    return read, examples_per_step


def _assemble(examples: Sequence[ExampleSamples]) -> dict[str, Any]:
    """Stack samples into a host's part of a batch; the key 'skipped' lists the skipped examples."""
    samples = sorted((pair for example in examples for pair in example.samples), key=itemgetter(0))
    skipped = [skip for example in examples for skip in example.skipped]
    return {**stack([arrays for _, arrays in samples]), "skipped": skipped}


def _end_with_parent(worker: int, workers: int) -> None:
    """End this worker process as soon as its parent has ended, even if the parent was killed."""
    # Otherwise the worker would wait forever to hand over its batches. After the last worker,
    # Python's resource tracker ends too and frees the shared memory that held the batches.
    del worker, workers
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has been started by another process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def iterate(
    elements: grain.MapDataset,
    batch_size: int,
    assemble: Callable[[Sequence[Any]], Any],
    num_threads: int,
    num_workers: int = 0,
) -> Any:
    """Iterate over batches of consecutive elements, in order, until exhausted or closed.

    `num_threads` threads compute single elements; if it is 0, the caller's thread does. If
    `num_workers` is positive, as many processes compute whole batches, because passing many small
    objects between processes costs more. `assemble` makes a batch from a list of elements.
    """
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags to start its workers
            flags.FLAGS.mark_as_parsed()
        if QUIET_TRACKER not in sys.warnoptions:  # child processes inherit these options
            sys.warnoptions.append(QUIET_TRACKER)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        batches = elements.batch(batch_size, batch_fn=assemble).to_iter_dataset(options)
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=BATCHES_AHEAD)
        return iter(batches.mp_prefetch(workers, _end_with_parent))
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(16, 4 * num_threads)
    )
    batches = elements.to_iter_dataset(options).batch(batch_size, batch_fn=assemble)
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
    """Iterate over this host's part of the training batches of a range of steps.

    Args:
      source: the training set.
      transform: makes the arrays of a sample from an example, a random generator and `config`.
      config: the whole config; `seed`, `batch_size` (global), `augment` and `data` are used.
      first_step: the first step; a resumed run passes its current step.
      last_step: the step after the last one.
      process: the index of this host, from 0.
      processes: the number of hosts, which divides the batch size.
      skipped: counts the images that cannot be read, if `config.data.on_error` is 'skip'.

    Yields:
      A batch of `batch_size / processes` samples: stacked arrays, by name. Close the iterator to
      stop its threads and processes.

    Raises:
      BrokenImageError: an image cannot be read and `config.data.on_error` is 'raise', or more than
        `config.data.max_skipped` examples in a row are broken.
      UserError: `skipped` counts more images than its limit.
    """
    read, examples_per_step = example_reader(source, transform, config, process, processes)
    indices = grain.MapDataset.range(first_step * examples_per_step, last_step * examples_per_step)
    data = config.data
    iterator = iterate(
        indices.map(read), examples_per_step, _assemble, data.num_threads, data.num_workers
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
    """Iterate once over this host's part of an evaluation set, in order.

    Each host has one block of consecutive rows of every global batch of `batch_size`. Images are
    resized and cropped as `preprocessing` says; normalization happens on the device.

    Yields:
      `image` `[B, S, S, 3]` uint8, `label` `[B]` int32, and `mask` `[B]` float32, for this host's B
      images and the image size S. The mask is 1 for an example and 0 for padding, which fills the
      last batch so that all hosts take the same number of steps.

    Raises:
      BrokenImageError: an image cannot be read.
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

    elements = grain.MapDataset.range(steps * local_batch).map(sample)
    with contextlib.closing(iterate(elements, local_batch, stack, num_threads)) as batches:
        yield from batches

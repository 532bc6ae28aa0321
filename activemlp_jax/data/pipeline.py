"""From an index to a batch: what a step sees is a pure function of the seed and the step.

Positions count the samples of a run, over all epochs and hosts. A position alone decides which
example is read and which random numbers change it, so that neither the number of workers, nor
that of hosts, nor a restart in between alters a batch; a run resumes from its step number.
"""

import functools
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import Source
from activemlp_jax.data.transforms import eval_transform, train_transform
from activemlp_jax.errors import UserError

Batch = dict[str, np.ndarray]


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Full batches in one pass; the rest of a shuffled pass is left out.

    Raises:
      UserError: the data set is smaller than a batch.
    """
    if len(source) < batch_size:
        raise UserError(
            f"batch_size is {batch_size}, but the training set has only {len(source)} images"
        )
    return len(source) // batch_size


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _shuffled_index(position: int, length: int, epoch_length: int, seed: int) -> int:
    """The example at `position` of a run whose epochs are cut to `epoch_length` samples."""
    epoch, place = divmod(position, epoch_length)
    return index_shuffle(place, length - 1, _epoch_seed(seed, epoch), rounds=4)


def _global_position(index: int, local_batch: int, process: int, processes: int) -> int:
    """Hosts hold consecutive blocks of every global batch."""
    step, row = divmod(index, local_batch)
    return (step * processes + process) * local_batch + row


def train_batches(
    source: Source,
    config: ConfigDict,
    *,
    first_step: int,
    last_step: int,
    process: int = 0,
    processes: int = 1,
) -> Generator[Batch]:
    """This host's part of the batches of the steps `first_step` to `last_step - 1`.

    Args:
      source: the training set.
      config: the whole config; `seed`, `batch_size` (global) and `data` are read.
      first_step: the first to give; a resumed run passes the step it is at.
      last_step: where to end.
      process: this host's number among `processes`, which divides the batch size.
      processes: the number of hosts.

    Yields:
      `image` `[batch_size / processes, S, S, 3]` uint8 and `label` `[batch_size / processes]`
      int32. Close the iterator to end its threads.
    """
    local_batch = config.batch_size // processes
    epoch_length = steps_per_epoch(source, config.batch_size) * config.batch_size
    data = config.data

    def sample(index: int) -> dict[str, Any]:
        position = _global_position(index, local_batch, process, processes)
        place = _shuffled_index(position, len(source), epoch_length, config.seed)
        example = source[place]
        rng = np.random.default_rng([config.seed, position])
        image = train_transform(example.image, rng, data)
        return {"image": image, "label": np.int32(example.label)}

    dataset = grain.MapDataset.range(first_step * local_batch, last_step * local_batch)
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=16)
    iterator = iter(dataset.map(sample).batch(local_batch).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


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

    Args:
      source: the set to evaluate on.
      preprocessing: of each image; normalising is left to the device.
      batch_size: over all hosts.
      num_threads: that read and transform; 0 for none but the caller's.
      process: this host's number among `processes`, which divides the batch size.
      processes: the number of hosts.

    Yields:
      `image` and `label` as `train_batches`, and `mask` `[B]` float32: 1 for an example, 0 for
      the padding that fills the last batch, so that all hosts take the same number of steps.
    """
    local_batch = batch_size // processes
    steps = -(-len(source) // batch_size)

    def sample(index: int) -> dict[str, Any]:
        position = _global_position(index, local_batch, process, processes)
        example = source[min(position, len(source) - 1)]
        return {
            "image": eval_transform(example.image, preprocessing),
            "label": np.int32(example.label),
            "mask": np.float32(position < len(source)),
        }

    dataset = grain.MapDataset.range(steps * local_batch).map(sample).batch(local_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=16)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()

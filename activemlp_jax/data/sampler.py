"""The order of training samples: a pure function of the seed and a sample's position.

Positions count the samples of a run, over all epochs and hosts.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

from activemlp_jax.utils.errors import UserError

EPOCH_MULTIPLE = 256  # samples; see `SampleOrder`


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The order of a run's samples.

    Every epoch shuffles the whole dataset and drops the last, partial batch.

    With repeated augmentation, each image comes `repeats` times in a row. These copies are dealt
    round-robin to the mixing groups of a batch (the images that share one mixup or cutmix draw), so
    that each copy is mixed with a different partner. An epoch has as many samples as the dataset
    has examples, so it shows only one image in `repeats`. With repeats, the number of samples is
    rounded down to a multiple of `EPOCH_MULTIPLE`, unless it is smaller than that.

    Args:
      examples: the number of examples in the dataset.
      batch_size: the global batch size.
      repeats: how many times an epoch shows each of its images.
      groups: the number of mixing groups in a batch; divides `batch_size`.
      seed: the seed of the run.

    Raises:
      UserError: an epoch is smaller than a batch.

    Source: the repeated-augmentation sampler of the authors' release (DeiT's RASampler). A mixing
    group here corresponds to a device there.
    """

    examples: int
    batch_size: int
    repeats: int
    groups: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"config.batch_size is {self.batch_size}, but an epoch of the training set has "
                f"only {self._epoch_samples} images; lower it to a few batches an epoch, such as "
                f"--config.batch_size={max(1, self._epoch_samples // 4)}"
            )

    @property
    def _epoch_samples(self) -> int:
        """Number of samples in one epoch, counting a partial last batch."""
        if self.repeats == 1 or self.examples < EPOCH_MULTIPLE:
            return self.examples
        return self.examples // EPOCH_MULTIPLE * EPOCH_MULTIPLE

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in one epoch."""
        return self._epoch_samples // self.batch_size

    def place(self, position: int) -> tuple[int, int]:
        """Return the epoch of the sample at `position`, and its offset in that epoch."""
        return divmod(position, self.steps_per_epoch * self.batch_size)

    def example(self, epoch: int, image: int) -> int:
        """Return the dataset index of the `image`-th image of an epoch, not counting repeats."""
        return index_shuffle(image, self.examples - 1, _epoch_seed(self.seed, epoch), rounds=4)

    def row(self, offset: int) -> int:
        """Return the row of a batch in which its `offset`-th sample is placed."""
        index, group = divmod(offset, self.groups)
        return group * (self.batch_size // self.groups) + index

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples in a step's batch, by row."""
        epoch, start = self.place(step * self.batch_size)
        rows = {
            self.row(offset): self.example(epoch, (start + offset) // self.repeats)
            for offset in range(self.batch_size)
        }
        return [rows[row] for row in range(self.batch_size)]

"""Which example stands where: a pure function of the seed and the position.

Positions count the samples of a run, over all epochs and hosts.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

from activemlp_jax.utils.errors import UserError

EPOCH_MULTIPLE = 256  # to whose multiple the original cuts an epoch of repeated augmentation


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The order of a run's samples.

    Every epoch shuffles the whole set anew. With repeated augmentation an image stands `repeats`
    times in a row; the row is dealt out round-robin over the groups of a batch, so that the copies
    of an image are mixed with different partners; and an epoch is as long as without repeats, cut
    to a multiple of 256 (a set smaller than that is not cut): it shows one image in `repeats`.
    Only full batches count.

    Args:
      examples: of the data set.
      batch_size: over all hosts.
      repeats: how often an epoch shows an image that it shows.
      groups: of a batch; divides `batch_size`.
      seed: of the run.

    Raises:
      UserError: an epoch is smaller than a batch.

    Source: the repeated-augmentation sampler of the authors' release (DeiT's RASampler), whose
    devices are the groups here.
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
                f"only {self._uncut_epoch} images; lower it to a few batches an epoch, such as "
                f"--config.batch_size={max(1, self._uncut_epoch // 4)}"
            )

    @property
    def _uncut_epoch(self) -> int:
        if self.repeats == 1 or self.examples < EPOCH_MULTIPLE:
            return self.examples
        return self.examples // EPOCH_MULTIPLE * EPOCH_MULTIPLE

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch."""
        return self._uncut_epoch // self.batch_size

    def place(self, position: int) -> tuple[int, int]:
        """The epoch, and the place in it, of a sample of the run."""
        return divmod(position, self.steps_per_epoch * self.batch_size)

    def example(self, epoch: int, image: int) -> int:
        """The example that is the `image`-th of an epoch, repeats not counted."""
        return index_shuffle(image, self.examples - 1, _epoch_seed(self.seed, epoch), rounds=4)

    def row(self, place: int) -> int:
        """The row of a batch where the `place`-th of its samples goes."""
        index, group = divmod(place, self.groups)
        return group * (self.batch_size // self.groups) + index

    def batch(self, step: int) -> list[int]:
        """The examples of a step's batch, by row."""
        epoch, first = self.place(step * self.batch_size)
        rows = {
            self.row(place): self.example(epoch, (first + place) // self.repeats)
            for place in range(self.batch_size)
        }
        return [rows[row] for row in range(self.batch_size)]

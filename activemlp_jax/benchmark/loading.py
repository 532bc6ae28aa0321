"""How fast batches are loaded, compared with a plain implementation of the same batches."""

import contextlib
import io
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from activemlp_jax.data.base import EncodedSource
from activemlp_jax.data.image_transforms import color_jitter, draw_crop
from activemlp_jax.data.loader import Batch, Sample, iterate, sample_order, train_batches
from activemlp_jax.data.randaugment import parse_randaugment
from activemlp_jax.tasks.classification import Classification


class Rates(NamedTuple):
    """Images per second of both implementations, one figure per round."""

    ours: list[float]
    plain: list[float]


def plain_batches(
    source: EncodedSource, config: ConfigDict, first_step: int, last_step: int
) -> Generator[Batch]:
    """Yield the batches of `train_batches` on one host, made the usual way, for comparison.

    Pillow alone reads, decodes and transforms every sample, in as many threads.

    Args:
      source: the training set.
      config: the whole config; `augment.policy` is 'random_resized_crop'.
      first_step: first step to make a batch for.
      last_step: the step after the last one.
    """
    order = sample_order(config, len(source))
    batch_size, data, augment = config.batch_size, config.data, config.augment

    def sample(position: int) -> Sample:
        epoch, index = order.place(position)
        example = source.encoded(order.example(epoch, index // augment.repeats))
        rng = np.random.default_rng([config.seed, position])
        with Image.open(io.BytesIO(example.data)) as image:
            picture = image.convert("RGB")
        box = draw_crop(rng, *picture.size, augment.crop)
        picture = picture.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        picture = picture.resize((data.image_size,) * 2, Image.Resampling.BICUBIC)
        if rng.random() < augment.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.rand_augment:
            picture = parse_randaugment(augment.rand_augment)(picture, rng)
        elif augment.color_jitter:
            picture = color_jitter(picture, rng, augment.color_jitter)
        arrays = {"image": np.asarray(picture), "label": np.asarray(example.label, np.int32)}
        return Sample(order.row(position % batch_size), arrays)

    def stack(samples: Sequence[Sample]) -> Batch:
        rows = sorted(samples, key=lambda sample: sample.row)
        return {name: np.stack([sample.arrays[name] for sample in rows]) for name in rows[0].arrays}

    elements = grain.MapDataset.range(first_step * batch_size, last_step * batch_size)
    iterator: Any = iterate(elements.map(sample), batch_size, stack, data.num_threads)
    with contextlib.closing(iterator):
        yield from iterator


def images_per_second(batches: Iterator[Batch]) -> float:
    """Rate over all batches but the first, during which threads and processes start."""
    batch_size = len(next(batches)["label"])
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * batch_size / (time.perf_counter() - started)


def measure(source: EncodedSource, config: ConfigDict, steps: int, rounds: int) -> Rates:
    """Time both implementations in turns on the same batches.

    Args:
      source: the training set.
      config: the whole config; `augment.policy` is 'random_resized_crop'.
      steps: batches per round.
      rounds: rounds of each implementation.
    """
    rates = Rates([], [])
    for number in range(rounds):
        first = number * (steps + 1)
        last = first + steps + 1
        with contextlib.closing(
            train_batches(
                source, Classification.transform, config, first_step=first, last_step=last
            )
        ) as ours:
            rates.ours.append(images_per_second(ours))
        with contextlib.closing(plain_batches(source, config, first, last)) as plain:
            rates.plain.append(images_per_second(plain))
    return rates

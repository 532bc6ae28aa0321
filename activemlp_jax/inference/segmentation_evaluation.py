"""Confusion matrices of segmentation models over a dataset."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activemlp_jax.data.base import SceneSource
from activemlp_jax.data.loader import iterate, stack
from activemlp_jax.data.segmentation_transforms import IGNORED, pad
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.segment import BatchKey, Segmenter, label_maps
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Variables


def count_pixels(labels: jax.Array, predictions: jax.Array, classes: int) -> jax.Array:
    """Count the confusion matrix of each image; pixels with the label `IGNORED` do not count.

    Args:
      labels: `[B, H, W]` uint8.
      predictions: `[B, H, W]` int32.
      classes: number of classes K.

    Returns:
      Confusion matrices `[B, K, K]` int32: numbers of pixels by label and prediction.
    """
    ignored = classes * classes  # an index past the end, so that scatter-add drops it

    def count(label: jax.Array, prediction: jax.Array) -> jax.Array:
        label = label.astype(jnp.int32)
        pair = jnp.where(label == IGNORED, ignored, label * classes + prediction)
        counts = jnp.zeros(ignored, jnp.int32).at[pair.reshape(-1)].add(1, mode="drop")
        return counts.reshape(classes, classes)

    return jax.vmap(count)(labels, predictions)


class Part(NamedTuple):
    """The indices of a batch of scenes, and the key that all of them share."""

    indices: list[int]
    key: BatchKey


def plan_parts(keys: Sequence[BatchKey], batch_size: int) -> list[Part]:
    """Divide all scenes into batches of scenes with equal keys; the largest scenes come first."""
    by_key: dict[BatchKey, list[int]] = {}
    for index, key in enumerate(keys):
        by_key.setdefault(key, []).append(index)

    def order(key: BatchKey) -> tuple[int, BatchKey]:
        return -sum(height * width for (height, width), _ in key.views), key

    return [
        Part(by_key[key][first : first + batch_size], key)
        for key in sorted(by_key, key=order)
        for first in range(0, len(by_key[key]), batch_size)
    ]


def _load_parts(
    segmenter: Segmenter,
    source: SceneSource,
    parts: Sequence[Part],
    batch_size: int,
    num_threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield this host's rows of each part, in order; padding rows have only `IGNORED` labels."""
    local = batch_size // jax.process_count()

    def scene(number: int) -> dict[str, np.ndarray]:
        part, row = divmod(number, local)
        indices, position = parts[part].indices, jax.process_index() * local + row
        is_padding = position >= len(indices)
        example = source[indices[0 if is_padding else position]]
        label = np.full_like(example.label, IGNORED) if is_padding else example.label
        label = pad(label, parts[part].key.result, IGNORED)
        return {**segmenter.prepare(example.image), "label": label}

    elements = grain.MapDataset.range(len(parts) * local).map(scene)
    return iterate(elements, local, stack, num_threads)


def make_evaluation(
    segmenter: Segmenter,
    mesh: Mesh,
    batch_size: int,
    num_threads: int,
    watch: Callable[[Sequence[Part]], Iterator[Part]] = iter,
) -> Callable[[Mapping[str, Variables], SceneSource], dict[str, dict[str, np.ndarray]]]:
    """Make a function that evaluates several sets of weights in one pass over a dataset.

    The function keeps its compiled programs for the next call.

    Args:
      segmenter: the model to evaluate.
      mesh: all devices of all hosts, over which variables may be sharded.
      batch_size: scenes per batch, over all devices.
      num_threads: threads on each host that read and resize; 0 uses the caller's thread.
      watch: returns an iterator over the given parts, which may show progress.

    Returns:
      A function that takes sets of variables on the devices, keyed by name, and the labeled scenes.
      For each name it returns `confusion` `[K, K]` int64: pixels by label and prediction, counting
      each scene once. It raises UserError if a scene cannot be read, or if no pixel has a label.
    """
    classes = segmenter.model.num_classes

    def view_logits(variables: Variables, images: jax.Array) -> jax.Array:
        return segmenter.logits(sharding.gather(variables, mesh), images)

    def count_batch(
        groups: Sequence[int], batch: dict[str, jax.Array], logits: Sequence[jax.Array]
    ) -> jax.Array:
        predictions = label_maps(batch, logits, groups)
        return count_pixels(batch["label"], predictions, classes).sum(0)

    logits = jax.jit(sharding.on_mesh(view_logits, mesh))
    count = jax.jit(count_batch, static_argnums=0, out_shardings=sharding.replicated(mesh))

    def evaluate(
        weights: Mapping[str, Variables], source: SceneSource
    ) -> dict[str, dict[str, np.ndarray]]:
        keys = [segmenter.key(source.shape(index)) for index in range(len(source))]
        parts = plan_parts(keys, batch_size)
        sums = {name: np.zeros((classes, classes), np.int64) for name in weights}
        batches: Any = _load_parts(segmenter, source, parts, batch_size, num_threads)
        with contextlib.closing(batches):
            for part, batch in zip(watch(parts), batches, strict=True):
                groups = tuple(group for _, group in part.key.views)
                on_devices = sharding.put_batch(batch, mesh)
                confusions = {}
                for name, variables in weights.items():
                    views = [logits(variables, on_devices[f"view_{i}"]) for i in range(len(groups))]
                    confusions[name] = count(groups, on_devices, views)
                for name, confusion in jax.device_get(confusions).items():
                    sums[name] += confusion
        if not all(confusion.any() for confusion in sums.values()):
            raise UserError(f"none of the {len(source)} scenes has a pixel with a label to count")
        return {name: {"confusion": confusion} for name, confusion in sums.items()}

    return evaluate

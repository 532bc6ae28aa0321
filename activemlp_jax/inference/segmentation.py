"""Label maps from a segmentation model, and confusion matrices over a dataset.

JAX compiles a program for each shape, and scenes come in hundreds of shapes. Only the network
itself is compiled for every exact size that it sees. All that follows is compiled for sizes rounded
up: logits and matrices are padded with zeros, which changes no sum.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.loader import iterate
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_sources import SceneSource
from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.tiling import (
    PUBLISHED,
    Protocol,
    Shape,
    cut_views,
    plan_views,
    view_matrices,
)
from activemlp_jax.models.layers import wide
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.utils.errors import UserError

LOGITS_MULTIPLE, RESULT_MULTIPLE = 16, 64  # sides after the network are rounded up to these
BLOCK_ROWS = 32  # rows computed at a time: probabilities of all pixels would not fit in memory

Batch = dict[str, Any]


def round_up(number: int, multiple: int) -> int:
    """Round `number` up to a multiple of `multiple`."""
    return -(-number // multiple) * multiple


def _pad(array: np.ndarray, shape: Sequence[int], value: float = 0) -> np.ndarray:
    """Pad `array` to `shape` with `value`, at the end of each axis."""
    padded = np.full(shape, value, array.dtype)
    padded[tuple(slice(side) for side in array.shape)] = array
    return padded


def view_logits(model: ActiveSegmentor, variables: Any, images: jax.Array) -> jax.Array:
    """Compute zero-padded logits `[B, h, w, K]` of normalized `images` `[B, H, W, 3]`."""
    logits = jnp.asarray(model.apply(variables, images))
    _, height, width, _ = logits.shape
    padding = [(0, round_up(side, LOGITS_MULTIPLE) - side) for side in (height, width)]
    return jnp.pad(logits, ((0, 0), *padding, (0, 0)))


def merge_views(
    logits: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    groups: Sequence[int],
) -> jax.Array:
    """Compute class probabilities from the logits of all views, for B scenes of one shape.

    Args:
      logits: logits `[B, h, w, K]` of each view.
      rows: matrix `[B, R, h]` of each view, from rows of its logits to rows of the result; see
        `tiling.view_matrices`.
      columns: matrix `[B, W, w]` of each view, in the same way.
      groups: group of each view. Logits are summed within a group, and probabilities are averaged
        over groups.

    Returns:
      Probabilities `[B, R, W, K]`.
    """
    sums: dict[int, jax.Array] = {}
    for maps, down, across, group in zip(logits, rows, columns, groups, strict=True):
        tall = jnp.einsum("bih,bhwk->biwk", down, maps, precision="highest")
        whole = jnp.einsum("bjw,biwk->bijk", across, tall, precision="highest")
        sums[group] = sums[group] + whole if group in sums else whole
    total = sum(jax.nn.softmax(scores, axis=-1) for scores in sums.values())
    return jnp.asarray(total) / len(sums)


def label_maps(batch: Batch, logits: Sequence[jax.Array], groups: Sequence[int]) -> jax.Array:
    """Find the most probable class of each pixel, one block of rows at a time.

    Args:
      batch: holds the matrices `rows_i` and `columns_i` of each view i.
      logits: logits `[B, h, w, K]` of each view.
      groups: group of each view.

    Returns:
      Label maps `[B, H, W]` int32.
    """
    rows = [batch[f"rows_{i}"] for i in range(len(logits))]
    columns = [batch[f"columns_{i}"] for i in range(len(logits))]
    size, height = rows[0].shape[:2]
    blocks = [
        matrix.reshape(size, height // BLOCK_ROWS, BLOCK_ROWS, -1).swapaxes(0, 1) for matrix in rows
    ]

    def block(down: Sequence[jax.Array]) -> jax.Array:
        return merge_views(logits, down, columns, groups).argmax(-1)

    labels = jax.lax.map(block, blocks)  # [H / BLOCK_ROWS, B, BLOCK_ROWS, W]
    return labels.swapaxes(0, 1).reshape(size, height, -1)


def count_pixels(labels: jax.Array, predictions: jax.Array, classes: int) -> jax.Array:
    """Count confusion matrices, label by prediction, without `IGNORED` labels.

    Args:
      labels: `[B, H, W]` uint8.
      predictions: `[B, H, W]` int32.
      classes: number of classes K.

    Returns:
      Confusion matrices `[B, K, K]` int32, in pixels.
    """
    ignored = classes * classes  # past the end, so dropped

    def count(label: jax.Array, prediction: jax.Array) -> jax.Array:
        label = label.astype(jnp.int32)
        pair = jnp.where(label == IGNORED, ignored, label * classes + prediction)
        counts = jnp.zeros(ignored, jnp.int32).at[pair.reshape(-1)].add(1, mode="drop")
        return counts.reshape(classes, classes)

    return jax.vmap(count)(labels, predictions)


class BatchKey(NamedTuple):
    """Properties that all scenes of a batch share: their views, and the size of the result."""

    views: tuple[tuple[Shape, int], ...]  # shape and group of each view
    result: Shape


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A segmentation model with its preprocessing and protocol.

    Args:
      model: the model.
      preprocessing: how to prepare its images.
      protocol: scales, flips and windows to use.
    """

    model: ActiveSegmentor
    preprocessing: ScenePreprocessing
    protocol: Protocol = PUBLISHED

    def key(self, shape: Shape) -> BatchKey:
        """Compute the batch key of a scene of `shape` (height, width)."""
        views = plan_views(*shape, self.preprocessing, self.protocol)
        height, width = (round_up(side, RESULT_MULTIPLE) for side in shape)
        return BatchKey(tuple((view.shape, view.group) for view in views), (height, width))

    def prepare(self, image: np.ndarray) -> Batch:
        """Compute the views of `image` `[H, W, 3]` uint8 and their matrices, for the device."""
        height, width = image.shape[:2]
        views = plan_views(height, width, self.preprocessing, self.protocol)
        _, result_shape = self.key((height, width))
        dtype = np.dtype(wide(self.model.dtype))
        batch: Batch = {}
        matrices = view_matrices(height, width, views)
        for i, (pixels, pair) in enumerate(zip(cut_views(image, views), matrices, strict=True)):
            batch[f"view_{i}"] = pixels
            for name, matrix, size in zip(("rows", "columns"), pair, result_shape, strict=True):
                side = round_up(matrix.shape[1], LOGITS_MULTIPLE)
                batch[f"{name}_{i}"] = _pad(matrix.astype(dtype), (size, side))
        return batch

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Compute the logits of one view from uint8 images; see `view_logits`."""
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        return view_logits(self.model, variables, normalized)

    def count(self, groups: Sequence[int], batch: Batch, logits: Sequence[jax.Array]) -> jax.Array:
        """Count the confusion matrix `[K, K]` of a batch with `label`, summed over its scenes."""
        predictions = label_maps(batch, logits, groups)
        return count_pixels(batch["label"], predictions, self.model.num_classes).sum(0)


class Part(NamedTuple):
    """A batch of scenes: their indices, the number of padding rows, and their key."""

    indices: list[int]
    padding: int
    key: BatchKey


def plan_parts(keys: Sequence[BatchKey], batch_size: int) -> list[Part]:
    """Group all scenes, each once, into batches of equal keys; the largest scenes come first.

    Args:
      keys: key of each scene, by index.
      batch_size: scenes per batch, including padding.
    """
    by_key: dict[BatchKey, list[int]] = {}
    for index, key in enumerate(keys):
        by_key.setdefault(key, []).append(index)

    def pixels(key: BatchKey) -> tuple[int, BatchKey]:
        return -sum(height * width for (height, width), _ in key.views), key

    parts = []
    for key in sorted(by_key, key=pixels):
        indices = by_key[key]
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            parts.append(Part(chosen, batch_size - len(chosen), key))
    return parts


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for an evaluation over a dataset.

    Args:
      batch_size: scenes per batch, over all devices.
      num_threads: threads on each host that read and resize; 0 uses the caller's thread.
      watch: returns an iterator over the given parts, which may show progress.
    """

    batch_size: int
    num_threads: int
    watch: Callable[[Sequence[Part]], Iterator[Part]] = iter


def _load_parts(
    segmenter: Segmenter, source: SceneSource, parts: Sequence[Part], settings: Settings
) -> Iterator[Batch]:
    """Yield this host's rows of each part, in order."""
    local = settings.batch_size // jax.process_count()

    def scene(number: int) -> Batch:
        part, row = divmod(number, local)
        indices, position = parts[part].indices, jax.process_index() * local + row
        is_padding = position >= len(indices)
        example = source[indices[0 if is_padding else position]]
        batch = segmenter.prepare(example.image)
        label = np.full_like(example.label, IGNORED) if is_padding else example.label
        return {**batch, "label": _pad(label, parts[part].key.result, IGNORED)}

    def stack(scenes: Sequence[Batch]) -> Batch:
        return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}

    elements = grain.MapDataset.range(len(parts) * local).map(scene)
    return iterate(elements, local, stack, settings.num_threads)


Evaluation = Callable[[Mapping[str, Any], SceneSource], dict[str, dict[str, np.ndarray]]]


def make_evaluation(segmenter: Segmenter, mesh: Mesh, settings: Settings) -> Evaluation:
    """Make a function that evaluates several sets of weights in one pass over a dataset.

    The function keeps its compiled programs for the next call.

    Args:
      segmenter: the model to evaluate.
      mesh: all devices of all hosts, over which variables may be split.
      settings: batch size, threads and progress.

    Returns:
      A function of variables, keyed by name and on the devices, and of labeled scenes. For each
      name it returns `confusion` `[K, K]` int64: pixels by label and prediction, counting each
      scene once. It raises BrokenImageError or another UserError if a scene cannot be read, and
      UserError if no pixel has a label.
    """

    def gathered_logits(variables: Any, images: jax.Array) -> jax.Array:
        return segmenter.logits(sharding.gather(variables, mesh), images)

    logits = jax.jit(sharding.on_mesh(gathered_logits, mesh))
    replicated = sharding.replicated(mesh)
    count = jax.jit(segmenter.count, static_argnums=0, out_shardings=replicated)

    def evaluate(
        weights: Mapping[str, Any], source: SceneSource
    ) -> dict[str, dict[str, np.ndarray]]:
        return _evaluate(segmenter, weights, source, mesh, settings, logits, count)

    return evaluate


def _evaluate(
    segmenter: Segmenter,
    weights: Mapping[str, Any],
    source: SceneSource,
    mesh: Mesh,
    settings: Settings,
    logits: Callable[[Any, jax.Array], jax.Array],
    count: Callable[..., jax.Array],
) -> dict[str, dict[str, np.ndarray]]:
    keys = [segmenter.key(source.shape(index)) for index in range(len(source))]
    parts = plan_parts(keys, settings.batch_size)
    classes = segmenter.model.num_classes
    sums = {name: np.zeros((classes, classes), np.int64) for name in weights}
    batches: Any = _load_parts(segmenter, source, parts, settings)
    with contextlib.closing(batches):
        for part, batch in zip(settings.watch(parts), batches, strict=True):
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


def segment_image(segmenter: Segmenter, variables: Any, image: np.ndarray) -> np.ndarray:
    """Find the class `[H, W]` int32 of each pixel of `image` `[H, W, 3]` uint8."""
    groups = tuple(group for _, group in segmenter.key(image.shape[:2]).views)
    batch = {name: array[None] for name, array in segmenter.prepare(image).items()}
    logits = [_jit_logits(segmenter, variables, batch[f"view_{i}"]) for i in range(len(groups))]
    labels = _jit_label_maps(batch, logits, groups)[0]
    return np.asarray(labels)[: image.shape[0], : image.shape[1]]


_jit_logits = jax.jit(Segmenter.logits, static_argnums=0)
_jit_label_maps = jax.jit(label_maps, static_argnums=2)

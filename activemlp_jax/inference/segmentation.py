"""Label maps of scenes by a segmentation model, and how well they agree with the truth.

Every shape compiles once, and scenes come in hundreds of shapes. So what is large, the network, is
compiled for the exact sizes that it is to see, and what comes after it for sizes rounded up: there
zeros are added to logits and matrices, which changes no sum.
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

from activemlp_jax.data.batch_transforms import normalise
from activemlp_jax.data.loader import iterate
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_sources import SceneSource
from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.distributed import sharding
from activemlp_jax.inference.tiling import (
    PUBLISHED,
    Protocol,
    Shape,
    plan_views,
    show,
    view_matrices,
)
from activemlp_jax.models.layers import wide
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.utils.errors import UserError

LOGITS_MULTIPLE, RESULT_MULTIPLE = 16, 64  # what sides are rounded up to after the network
BLOCK = 32  # rows of a result at a time, as all classes of all pixels would fill the memory

Batch = dict[str, Any]


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is no less than `number`."""
    return -(-number // multiple) * multiple


def _filled(array: np.ndarray, shape: Sequence[int], value: float = 0) -> np.ndarray:
    """`array`, filled up with `value` at the end of each axis."""
    filled = np.full(shape, value, array.dtype)
    filled[tuple(slice(side) for side in array.shape)] = array
    return filled


def view_logits(model: ActiveSegmentor, variables: Any, images: jax.Array) -> jax.Array:
    """Logits `[B, h, w, K]` of normalised `images` `[B, H, W, 3]`, sides rounded up by zeros."""
    logits = jnp.asarray(model.apply(variables, images))
    _, height, width, _ = logits.shape
    fill = [(0, round_up(side, LOGITS_MULTIPLE) - side) for side in (height, width)]
    return jnp.pad(logits, ((0, 0), *fill, (0, 0)))


def merge_views(
    logits: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    groups: Sequence[int],
) -> jax.Array:
    """Class probabilities from the logits of a scene's views, for B scenes alike.

    Args:
      logits: of each view, `[B, h, w, K]`.
      rows: of each view, `[B, R, h]`; see `views.view_matrices`.
      columns: of each view, `[B, W, w]`.
      groups: of each view; of one group logits are summed, of many probabilities averaged.

    Returns:
      `[B, R, W, K]`.
    """
    sums: dict[int, jax.Array] = {}
    for maps, down, across, group in zip(logits, rows, columns, groups, strict=True):
        tall = jnp.einsum("bih,bhwk->biwk", down, maps, precision="highest")
        whole = jnp.einsum("bjw,biwk->bijk", across, tall, precision="highest")
        sums[group] = sums[group] + whole if group in sums else whole
    total = sum(jax.nn.softmax(scores, axis=-1) for scores in sums.values())
    return jnp.asarray(total) / len(sums)


def label_maps(batch: Batch, logits: Sequence[jax.Array], groups: Sequence[int]) -> jax.Array:
    """The most probable class `[B, H, W]` int32 of each pixel, a block of rows after the other.

    Args:
      batch: `rows_i` and `columns_i` for each view i.
      logits: of each view, `[B, h, w, K]`.
      groups: of each view.
    """
    rows = [batch[f"rows_{i}"] for i in range(len(logits))]
    columns = [batch[f"columns_{i}"] for i in range(len(logits))]
    size, height = rows[0].shape[:2]
    blocks = [matrix.reshape(size, height // BLOCK, BLOCK, -1).swapaxes(0, 1) for matrix in rows]

    def block(down: Sequence[jax.Array]) -> jax.Array:
        return merge_views(logits, down, columns, groups).argmax(-1)

    found = jax.lax.map(block, blocks)  # [H / BLOCK, B, BLOCK, W]
    return found.swapaxes(0, 1).reshape(size, height, -1)


def count_pixels(labels: jax.Array, predictions: jax.Array, classes: int) -> jax.Array:
    """Confusion matrices `[B, K, K]` int32, label by prediction, without `IGNORED` labels.

    Args:
      labels: `[B, H, W]` uint8.
      predictions: `[B, H, W]` int32.
      classes: K.
    """
    none = classes * classes  # beyond the end, and dropped

    def count(label: jax.Array, prediction: jax.Array) -> jax.Array:
        label = label.astype(jnp.int32)
        pair = jnp.where(label == IGNORED, none, label * classes + prediction)
        counts = jnp.zeros(none, jnp.int32).at[pair.reshape(-1)].add(1, mode="drop")
        return counts.reshape(classes, classes)

    return jax.vmap(count)(labels, predictions)


class Key(NamedTuple):
    """What scenes must have in common to be in one batch: the views, and the result's size."""

    views: tuple[tuple[Shape, int], ...]  # shape and group of each
    result: Shape


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A segmentation model, made ready to be asked.

    Args:
      model: the model.
      preprocessing: of its images.
      protocol: how label maps are asked for.
    """

    model: ActiveSegmentor
    preprocessing: ScenePreprocessing
    protocol: Protocol = PUBLISHED

    def key(self, shape: Shape) -> Key:
        """Of a scene of (height, width) `shape`."""
        views = plan_views(*shape, self.preprocessing, self.protocol)
        height, width = (round_up(side, RESULT_MULTIPLE) for side in shape)
        return Key(tuple((view.shape, view.group) for view in views), (height, width))

    def prepare(self, image: np.ndarray) -> Batch:
        """What the device needs of `image` `[H, W, 3]` uint8: views and their matrices."""
        height, width = image.shape[:2]
        views = plan_views(height, width, self.preprocessing, self.protocol)
        _, (tall, wide_) = self.key((height, width))
        dtype = np.dtype(wide(self.model.dtype))
        batch: Batch = {}
        matrices = view_matrices(height, width, views)
        for i, (shown, pair) in enumerate(zip(show(image, views), matrices, strict=True)):
            batch[f"view_{i}"] = shown
            for name, matrix, size in zip(("rows", "columns"), pair, (tall, wide_), strict=True):
                side = round_up(matrix.shape[1], LOGITS_MULTIPLE)
                batch[f"{name}_{i}"] = _filled(matrix.astype(dtype), (size, side))
        return batch

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Of one view, from uint8 images; see `view_logits`."""
        shown = normalise(images, self.preprocessing.mean, self.preprocessing.std)
        return view_logits(self.model, variables, shown)

    def count(self, groups: Sequence[int], batch: Batch, logits: Sequence[jax.Array]) -> jax.Array:
        """The confusion matrix `[K, K]` of a batch with `label`, summed over its scenes."""
        predictions = label_maps(batch, logits, groups)
        return count_pixels(batch["label"], predictions, self.model.num_classes).sum(0)


class Part(NamedTuple):
    """Scenes that are looked at together: their indices, how many more there must be, their key."""

    indices: list[int]
    padding: int
    key: Key


def plan_parts(keys: Sequence[Key], batch_size: int) -> list[Part]:
    """All scenes, each once, in batches of scenes with equal keys; the largest come first.

    Args:
      keys: of the scenes, by index.
      batch_size: of each batch; what is missing is padded.
    """
    by_key: dict[Key, list[int]] = {}
    for index, key in enumerate(keys):
        by_key.setdefault(key, []).append(index)

    def pixels(key: Key) -> tuple[int, Key]:
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
    """How a data set is gone through.

    Args:
      batch_size: scenes at a time over all devices.
      num_threads: that read and resize on each host; 0 for none but the caller's.
      watch: given the parts to come, one by one, to show how far it is; gives them back.
    """

    batch_size: int
    num_threads: int
    watch: Callable[[Sequence[Part]], Iterator[Part]] = iter


def _prepared(
    segmenter: Segmenter, source: SceneSource, parts: Sequence[Part], settings: Settings
) -> Iterator[Batch]:
    """This host's rows of each part, in order."""
    host = sharding.this_host()
    local = settings.batch_size // host["processes"]

    def scene(number: int) -> Batch:
        part, row = divmod(number, local)
        indices, place = parts[part].indices, host["process"] * local + row
        is_padding = place >= len(indices)
        example = source[indices[0 if is_padding else place]]
        batch = segmenter.prepare(example.image)
        label = np.full_like(example.label, IGNORED) if is_padding else example.label
        return {**batch, "label": _filled(label, parts[part].key.result, IGNORED)}

    def stack(scenes: Sequence[Batch]) -> Batch:
        return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}

    elements = grain.MapDataset.range(len(parts) * local).map(scene)
    return iterate(elements, local, stack, settings.num_threads)


Evaluation = Callable[[Mapping[str, Any], SceneSource], dict[str, dict[str, np.ndarray]]]


def make_evaluation(
    segmenter: Segmenter,
    mesh: Mesh,
    settings: Settings,
    gather: Callable[[Any], Any] = lambda variables: variables,
) -> Evaluation:
    """The function that judges several weights on a data set, in one pass.

    What it compiles it keeps for the next time.

    Args:
      segmenter: to be judged.
      mesh: of all devices of all hosts.
      settings: how to go through a data set.
      gather: variables as they are kept to what the model needs on each device.

    Returns:
      From variables by name, on the devices, and scenes with their labels, to what was found by
      name: `confusion` `[K, K]` int64, label by prediction, in pixels. Each scene counts once. It
      raises BrokenImageError or another UserError for a scene that cannot be read, and UserError
      if no pixel has a label.
    """

    def find_logits(variables: Any, images: jax.Array) -> jax.Array:
        return segmenter.logits(gather(variables), images)

    logits = jax.jit(sharding.on_mesh(find_logits, mesh))
    everywhere = sharding.replicated(mesh)
    count = jax.jit(segmenter.count, static_argnums=0, out_shardings=everywhere)

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
    batches: Any = _prepared(segmenter, source, parts, settings)
    with contextlib.closing(batches):
        for part, batch in zip(settings.watch(parts), batches, strict=True):
            groups = tuple(group for _, group in part.key.views)
            placed = sharding.put_batch(batch, mesh)
            counted = {}
            for name, variables in weights.items():
                found = [logits(variables, placed[f"view_{i}"]) for i in range(len(groups))]
                counted[name] = count(groups, placed, found)
            for name, confusion in jax.device_get(counted).items():
                sums[name] += confusion
    if not all(confusion.any() for confusion in sums.values()):
        raise UserError(f"none of the {len(source)} scenes has a pixel with a label to count")
    return {name: {"confusion": confusion} for name, confusion in sums.items()}


def segment_image(segmenter: Segmenter, variables: Any, image: np.ndarray) -> np.ndarray:
    """The class `[H, W]` int32 of each pixel of `image` `[H, W, 3]` uint8."""
    groups = tuple(group for _, group in segmenter.key(image.shape[:2]).views)
    batch = {name: array[None] for name, array in segmenter.prepare(image).items()}
    logits = [_one_view(segmenter, variables, batch[f"view_{i}"]) for i in range(len(groups))]
    found = _one_result(batch, logits, groups)[0]
    return np.asarray(found)[: image.shape[0], : image.shape[1]]


_one_view = jax.jit(Segmenter.logits, static_argnums=0)
_one_result = jax.jit(label_maps, static_argnums=2)

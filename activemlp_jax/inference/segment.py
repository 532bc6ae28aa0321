"""Segmentation of images into label maps.

JAX compiles a program for each shape, and images come in hundreds of shapes. Therefore, only the
network itself is compiled for every exact input size. Everything after it is compiled for sizes
that are rounded up: logits and matrices are padded with zeros, which does not change any sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_transforms import pad
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.tiling import (
    PUBLISHED,
    Protocol,
    Shape,
    cut_views,
    plan_views,
    view_matrices,
)
from activemlp_jax.models.layers import at_least_float32
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.utils.types import Batch, Variables
from activemlp_jax.weights.model_card import ModelCard

LOGITS_MULTIPLE, RESULT_MULTIPLE = 16, 64  # sides of logits and results are rounded up to these
BLOCK_ROWS = 32  # rows computed at a time: probabilities of all pixels would not fit in memory


def round_up(number: int, multiple: int) -> int:
    """Round `number` up to a multiple of `multiple`."""
    return -(-number // multiple) * multiple


def view_logits(model: ActiveSegmentor, variables: Variables, images: jax.Array) -> jax.Array:
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
      rows: matrix `[B, R, h]` of each view for the R rows to compute; see `tiling.view_matrices`.
      columns: matrix `[B, W, w]` of each view.
      groups: index of the scale and flip of each view. Logits are summed within a group, and
        probabilities are averaged over groups.

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
    """Find the label maps `[B, H, W]` int32, one block of rows at a time.

    `batch` holds the matrices `rows_i` and `columns_i` of each view i; for the other arguments, see
    `merge_views`.
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


class BatchKey(NamedTuple):
    """Properties that all scenes of a batch share: their views, and the size of the result."""

    views: tuple[tuple[Shape, int], ...]  # shape and group of each view
    result: Shape


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A segmentation model with the preprocessing of its images and its inference protocol."""

    model: ActiveSegmentor
    preprocessing: ScenePreprocessing
    protocol: Protocol = PUBLISHED

    def key(self, shape: Shape) -> BatchKey:
        """Compute the batch key of a scene of `shape` (height, width)."""
        views = plan_views(*shape, self.preprocessing, self.protocol)
        height, width = (round_up(side, RESULT_MULTIPLE) for side in shape)
        return BatchKey(tuple((view.shape, view.group) for view in views), (height, width))

    def prepare(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the views and matrices of `image` `[H, W, 3]` uint8, as arrays for a batch."""
        height, width = image.shape[:2]
        views = plan_views(height, width, self.preprocessing, self.protocol)
        result = self.key((height, width)).result
        dtype = np.dtype(at_least_float32(self.model.dtype))
        batch = {}
        matrices = view_matrices(height, width, views)
        for i, (pixels, pair) in enumerate(zip(cut_views(image, views), matrices, strict=True)):
            batch[f"view_{i}"] = pixels
            for name, matrix, size in zip(("rows", "columns"), pair, result, strict=True):
                side = round_up(matrix.shape[1], LOGITS_MULTIPLE)
                batch[f"{name}_{i}"] = pad(matrix.astype(dtype), (size, side))
        return batch

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Compute the logits of one view from uint8 images; see `view_logits`."""
        normalized = normalize(images, self.preprocessing.mean, self.preprocessing.std)
        return view_logits(self.model, variables, normalized)


def segment_image(segmenter: Segmenter, variables: Variables, image: np.ndarray) -> np.ndarray:
    """Find the class `[H, W]` int32 of each pixel of `image` `[H, W, 3]` uint8."""
    groups = tuple(group for _, group in segmenter.key(image.shape[:2]).views)
    batch = {name: array[None] for name, array in segmenter.prepare(image).items()}
    logits = [_jit_logits(segmenter, variables, batch[f"view_{i}"]) for i in range(len(groups))]
    labels = _jit_label_maps(batch, logits, groups)[0]
    return np.asarray(labels)[: image.shape[0], : image.shape[1]]


_jit_logits = jax.jit(Segmenter.logits, static_argnums=0)
_jit_label_maps = jax.jit(label_maps, static_argnums=2)


def segment(
    model: ActiveSegmentor,
    variables: Variables,
    images: Any,
    card: ModelCard | None = None,
    protocol: Protocol = PUBLISHED,
) -> np.ndarray | list[np.ndarray]:
    """Find the class of each pixel of one image, or of each of several images.

    The network is compiled once for each input size.

    Args:
      model: a segmentation model.
      variables: variables of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]`, or the path of a file; or
        several of these, as a sequence or an array `[B, H, W, 3]`.
      card: result of `read_card`, for the preprocessing. A model with ADE20K's 150 classes does not
        need it: it gets the published preprocessing.
      protocol: scales, flips and windows to use.

    Returns:
      A label map `[H, W]` int32 of the same size as the image; for several images, a list of them.

    Raises:
      ValueError: if the model is not a segmentation model, the card is required but missing or does
        not match the model, an image is invalid, or there are no images.
      UserError: if an image must be resized and OpenCV is missing.

    Source: the inference of mmsegmentation 0.11, which the authors use for evaluation.
    """
    if not isinstance(model, ActiveSegmentor):
        raise ValueError(
            f"the model is an {type(model).__name__}, expected an ActiveSegmentor, which has a "
            "class for each pixel"
        )
    preprocessing = preprocessing_for(model, card)
    assert isinstance(preprocessing, ScenePreprocessing), "segmentors use ScenePreprocessing"
    segmenter = Segmenter(model, preprocessing, protocol)
    listed, is_one = list_images(images)
    results = [segment_image(segmenter, variables, pixels) for pixels in all_pixels(listed)]
    return results[0] if is_one else results

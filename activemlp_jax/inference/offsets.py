"""Inspect where the Active Token Mixer looks: the offsets and mixing weights of every block."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.data.batch_transforms import normalize
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.tiling import PUBLISHED, cut_views, plan_views
from activemlp_jax.models.segmentor import Model, backbone
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_card import ModelCard

STRIDES = (4, 8, 16, 32)  # input pixels between tokens, by stage


class BlockOffsets(NamedTuple):
    """Offsets and mixing weights of one block, as float32 arrays.

    `stage` is 0 to 3, `block` is the index of the block within its stage, and `stride` is the
    distance between two tokens in pixels of the input.

    `offset_w` and `offset_h` have shape `[B, H, W, G]`. Group g holds the channels `g*C/G` to
    `(g+1)*C/G - 1`. For these channels, a token reads `offset_w` tokens to the right in its row,
    and `offset_h` tokens down in its column.

    `weights` `[B, C, 3]` are the shares that each channel takes from the row, from the column and
    from the token itself; they sum to 1.
    """

    stage: int
    block: int
    stride: int
    offset_w: np.ndarray
    offset_h: np.ndarray
    weights: np.ndarray

    def __repr__(self) -> str:
        images, height, width, groups = self.offset_w.shape
        shares = ", ".join(f"{share:.2f}" for share in self.weights.mean((0, 1)))
        return (
            f"BlockOffsets(stage={self.stage}, block={self.block}, stride={self.stride}, "
            f"{images} x {height} x {width} tokens, {groups} groups, "
            f"mean |w| {np.abs(self.offset_w).mean():.2f}, "
            f"mean |h| {np.abs(self.offset_h).mean():.2f} tokens, weights ({shares}))"
        )


def inspect_offsets(
    model: Model, variables: Variables, images: Any, card: ModelCard | None = None
) -> list[BlockOffsets]:
    """Collect the offsets and mixing weights of every block for the given images.

    A block that computes no offsets of its own reports those of the block before it.

    Args:
      model: a classifier, or a segmentation model (its backbone is inspected).
      variables: variables of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]`, or the path of a file; or
        several of these, as a sequence or an array `[B, H, W, 3]`, if the model sees them at one
        size. A floating-point array `[B, H, W, 3]` is taken as normalized and used unchanged.
      card: result of `read_card`, for the preprocessing; required whenever `classify` or `segment`
        requires it.

    Returns:
      One `BlockOffsets` per block, from the first stage to the last. Each covers all B images:
      offsets in tokens, mixing weights as shares of 1, NumPy arrays in float32.

    Raises:
      ValueError: if the card is required but missing or does not match the model, the images are
        invalid or missing, or the model sees them at several sizes.

    Source: Active Token Mixer, section 3.
    """
    if hasattr(images, "dtype") and jnp.issubdtype(images.dtype, jnp.floating):
        inputs = jnp.asarray(images)
        if inputs.ndim != 4 or inputs.shape[-1] != 3 or min(inputs.shape) < 1:
            raise UserError(
                f"images have shape {inputs.shape}, expected [B, H, W, 3] of normalized values"
            )
    else:
        shown = show_to_model(model, images, card)
        preprocessing = preprocessing_for(model, card)
        inputs = normalize(jnp.asarray(shown), preprocessing.mean, preprocessing.std)
    stages = _run(model, variables, inputs)
    blocks = []
    for stage, depth in enumerate(backbone(model).depths):
        for block in range(depth):
            sown = stages[f"stages_{stage}"][f"block_{block}"]["atm"]
            offset, weight = (np.asarray(sown[key][-1], np.float32) for key in ("offset", "weight"))
            offset_w, offset_h = np.split(offset, 2, axis=-1)
            blocks.append(
                BlockOffsets(stage, block, STRIDES[stage], offset_w, offset_h, weight[:, 0, 0])
            )
    return blocks


def show_to_model(model: Model, images: Any, card: ModelCard | None = None) -> np.ndarray:
    """Prepare images as the model sees them: resized and cropped, but not normalized.

    The arguments and errors are those of `inspect_offsets`, but images are not floating-point.

    Returns:
      RGB pixels `[B, H, W, 3]` uint8; B is 1 for a single image.
    """
    preprocessing = preprocessing_for(model, card)
    listed, _ = list_images(images)
    prepared = [_prepare(pixels, preprocessing) for pixels in all_pixels(listed)]
    sizes = sorted({f"{width} x {height}" for height, width, _ in (one.shape for one in prepared)})
    if len(sizes) > 1:
        raise UserError(
            f"the model sees the images at the sizes {', '.join(sizes)} (width x height); give "
            "images of one size at a time"
        )
    return np.stack(prepared)


def group_weights(block: BlockOffsets) -> np.ndarray:
    """Average mixing weights over each group's channels to `[B, G, 3]` (row, column, token)."""
    images, channels, _ = block.weights.shape
    groups = block.offset_w.shape[-1]
    return block.weights.reshape(images, groups, channels // groups, 3).mean(2)


def mean_reach(block: BlockOffsets) -> np.ndarray:
    """Compute the mean distance at which each token reads, `[B, H, W]` in pixels of the input.

    The mean is over all groups and over row and column, weighted by the mixing weights.
    """
    weights = group_weights(block)[:, None, None, :, :2]
    distances = np.abs(np.stack((block.offset_w, block.offset_h), -1))
    return block.stride * (weights * distances).sum((-2, -1)) / weights.sum((-2, -1))


def _prepare(pixels: np.ndarray, preprocessing: Preprocessing | ScenePreprocessing) -> np.ndarray:
    """Resize and crop one image `[H, W, 3]` uint8 as the model sees it."""
    if isinstance(preprocessing, Preprocessing):
        return eval_transform(pixels, preprocessing)
    height, width, _ = pixels.shape
    (view,) = plan_views(height, width, preprocessing, PUBLISHED)
    return cut_views(pixels, [view])[0]


@partial(jax.jit, static_argnums=0)
def _run(model: Model, variables: Variables, images: jax.Array) -> dict[str, Any]:
    """Run the backbone and return what its blocks sow into 'intermediates'."""
    _, state = model.apply(variables, images, method="features", mutable=["intermediates"])
    sown = state["intermediates"]
    return sown.get("active_mlp", sown)

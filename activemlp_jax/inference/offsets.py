"""Where the Active Token Mixer looks: the offsets and mixing weights of every block, as numbers."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activemlp_jax.data.batch_transforms import normalise
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.tiling import PUBLISHED, plan_views, show
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import ModelCard, backbone

STRIDES = (4, 8, 16, 32)  # of the four stages


class BlockOffsets(NamedTuple):
    """Where one block reads, and how it mixes what it reads.

    `stage` is 0 to 3, `block` counts within it, and `stride` says how many pixels of the input lie
    between two tokens. Group g moves the channels `g*C/G` to `(g+1)*C/G - 1`: at a token they read
    in its row, `offset_w` to the right, and in its column, `offset_h` down, both `[B, H, W, G]` in
    tokens. `weights` `[B, C, 3]` are each channel's shares of what was read in the row, in the
    column, and of the token itself; they sum to 1. All arrays are float32.
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
    """Where each block reads for these images, in the order of the blocks.

    A block that makes no offsets of its own has those of the block before it.

    Args:
      model: a classifier, or a segmentation model, whose backbone is looked into.
      variables: of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]` or the path of a file; or many
        that the model sees at one size, in a sequence or an array `[B, H, W, 3]`. Floating arrays
        `[B, H, W, 3]` are taken as normalised, and shown as they are.
      card: what `read_card` gives, for the preprocessing; as for `classify` and `segment`, models
        of a published number of classes do without.

    Returns:
      A `BlockOffsets` for each block, those of the first stage first. It has the stage's tokens of
      all B images: offsets in tokens, mixing weights as shares of 1, numpy arrays in float32.

    Raises:
      ValueError: a card or images of another kind or shape, no card where it takes one, no images,
        or images that the model sees at several sizes.

    Source: Active Token Mixer, section 3.
    """
    if _is_floating(images):
        inputs = jnp.asarray(images)
        if inputs.ndim != 4 or inputs.shape[-1] != 3 or min(inputs.shape) < 1:
            raise UserError(
                f"images have shape {inputs.shape}, expected [B, H, W, 3] of normalised values"
            )
    else:
        shown = show_to_model(model, images, card)
        preprocessing = preprocessing_for(model, card)
        inputs = normalise(jnp.asarray(shown), preprocessing.mean, preprocessing.std)
    stages = _run(model, variables, inputs)
    found = []
    for stage, depth in enumerate(backbone(model).depths):
        for block in range(depth):
            left = stages[f"stages_{stage}"][f"block_{block}"]["atm"]
            offset, weight = (np.asarray(left[key][-1], np.float32) for key in ("offset", "weight"))
            offset_w, offset_h = np.split(offset, 2, axis=-1)
            found.append(
                BlockOffsets(stage, block, STRIDES[stage], offset_w, offset_h, weight[:, 0, 0])
            )
    return found


def show_to_model(model: Model, images: Any, card: ModelCard | None = None) -> np.ndarray:
    """What the model sees of `images`: cut and resized, but not normalised.

    Args:
      model: a classifier or a segmentation model.
      images: as `inspect_offsets` takes them, but for floating ones.
      card: as `inspect_offsets` takes it.

    Returns:
      `[B, H, W, 3]` uint8, red, green and blue, also of one image alone.

    Raises:
      ValueError: a card or images of another kind, no card where it takes one, no images, or of
        several sizes to the model.
    """
    preprocessing = preprocessing_for(model, card)
    listed, _ = list_images(images)
    shown = [_shown(pixels, preprocessing) for pixels in all_pixels(listed)]
    sizes = sorted({f"{width} x {height}" for height, width, _ in (part.shape for part in shown)})
    if len(sizes) > 1:
        raise UserError(
            f"the model sees the images at the sizes {', '.join(sizes)} (width x height); give "
            "images of one size at a time"
        )
    return np.stack(shown)


def group_weights(block: BlockOffsets) -> np.ndarray:
    """The mean mixing weights `[B, G, 3]` of each group's channels, for (w, h, own)."""
    images, channels, _ = block.weights.shape
    groups = block.offset_w.shape[-1]
    return block.weights.reshape(images, groups, channels // groups, 3).mean(2)


def mean_reach(block: BlockOffsets) -> np.ndarray:
    """How far away, on average, each token reads: `[B, H, W]` in pixels of the input.

    A group counts by its mixing weights for its row and for its column.
    """
    weights = group_weights(block)[:, None, None, :, :2]
    distances = np.abs(np.stack((block.offset_w, block.offset_h), -1))
    return block.stride * (weights * distances).sum((-2, -1)) / weights.sum((-2, -1))


def _is_floating(images: Any) -> bool:
    return hasattr(images, "dtype") and jnp.issubdtype(images.dtype, jnp.floating)


def _shown(pixels: np.ndarray, preprocessing: Preprocessing | ScenePreprocessing) -> np.ndarray:
    """What the model sees of one image `[H, W, 3]` uint8."""
    if isinstance(preprocessing, Preprocessing):
        return eval_transform(pixels, preprocessing)
    height, width, _ = pixels.shape
    (view,) = plan_views(height, width, preprocessing, PUBLISHED)
    return show(pixels, [view])[0]


@partial(jax.jit, static_argnums=0)
def _run(model: Model, variables: Variables, images: jax.Array) -> dict[str, Any]:
    """What the backbone's blocks leave in 'intermediates'."""
    _, state = model.apply(variables, images, method="features", mutable=["intermediates"])
    left = state["intermediates"]
    return left.get("active_mlp", left)

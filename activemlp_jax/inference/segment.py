"""Segmentation of images into label maps."""

from typing import Any

import numpy as np

from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.tiling import PUBLISHED, Protocol
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.weights.model_card import ModelCard


def segment(
    model: ActiveSegmentor,
    variables: Any,
    images: Any,
    card: ModelCard | None = None,
    protocol: Protocol = PUBLISHED,
) -> np.ndarray | list[np.ndarray]:
    """Find the class of each pixel of one image, or of each of several images.

    The network is compiled for each input size.

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
    from activemlp_jax.inference.segmentation import Segmenter, segment_image  # slow to import

    if not isinstance(model, ActiveSegmentor):
        raise ValueError(
            f"the model is an {type(model).__name__}, expected an ActiveSegmentor, which has a "
            "class for each pixel"
        )
    preprocessing = preprocessing_for(model, card)
    assert isinstance(preprocessing, ScenePreprocessing), (
        "segmentation models use ScenePreprocessing"
    )
    segmenter = Segmenter(model, preprocessing, protocol)
    listed, is_one = list_images(images)
    label_maps = [segment_image(segmenter, variables, pixels) for pixels in all_pixels(listed)]
    return label_maps[0] if is_one else label_maps

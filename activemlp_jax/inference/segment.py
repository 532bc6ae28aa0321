"""Label maps of images by a segmentation model."""

from typing import Any

import numpy as np

from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.inference.images import all_pixels, list_images
from activemlp_jax.inference.preprocessing import preprocessing_for
from activemlp_jax.inference.tiling import PUBLISHED, Protocol
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.weights.model_directory import ModelCard


def segment(
    model: ActiveSegmentor,
    variables: Any,
    images: Any,
    card: ModelCard | None = None,
    protocol: Protocol = PUBLISHED,
) -> np.ndarray | list[np.ndarray]:
    """The class of each pixel of one image, or of each of many.

    The network is compiled for each size that it sees.

    Args:
      model: a segmentation model.
      variables: of the model.
      images: a Pillow image, a uint8 array `[H, W]` or `[H, W, 3]` or the path of a file; or many,
        in a sequence or an array `[B, H, W, 3]`.
      card: what `read_card` gives, for the preprocessing. Only a model of ADE20K's 150 classes does
        without: then it is the published one.
      protocol: how label maps are asked for.

    Returns:
      A label map `[H, W]` int32 of the image's own size; of many images a list of them.

    Raises:
      ValueError: a model, card or image of another kind, no card where it takes one, or no images.
      UserError: OpenCV is missing, and an image must be resized.

    Source: the inference of mmsegmentation 0.11, by which the original tests.
    """
    from activemlp_jax.inference.segmentation import Segmenter, segment_image  # slow to import

    if not isinstance(model, ActiveSegmentor):
        raise ValueError(
            f"the model is an {type(model).__name__}, expected an ActiveSegmentor, which has a "
            "class for each pixel"
        )
    preprocessing = preprocessing_for(model, card)
    assert isinstance(preprocessing, ScenePreprocessing), "as every segmentation model's"
    segmenter = Segmenter(model, preprocessing, protocol)
    listed, is_one = list_images(images)
    found = [segment_image(segmenter, variables, pixels) for pixels in all_pixels(listed)]
    return found[0] if is_one else found

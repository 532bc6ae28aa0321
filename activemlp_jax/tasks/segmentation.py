"""What a segmentation model is trained for: loss and metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.batch_transforms import normalise
from activemlp_jax.data.preprocessing import ScenePreprocessing
from activemlp_jax.data.segmentation_transforms import IGNORED
from activemlp_jax.inference.segmentation import (
    Evaluation,
    Segmenter,
    Settings,
    make_evaluation,
    segment_image,
)
from activemlp_jax.inference.tiling import Protocol
from activemlp_jax.models.resizing import resize_bilinear
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.tasks.metrics import scene_metrics
from activemlp_jax.utils.types import Batch, Variables

AUXILIARY_WEIGHT = 0.4


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all pixels of the cross entropy; those that are ignored count as zeros.

    Args:
      logits: `[B, h, w, K]`, resized to the labels.
      labels: `[B, H, W]`, classes or `IGNORED`.

    Source: mmsegmentation's CrossEntropyLoss, which divides by the ignored pixels too.
    """
    logits = resize_bilinear(logits, *labels.shape[1:])
    known = labels != IGNORED
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(known, labels, 0).astype(jnp.int32)
    )
    return jnp.where(known, loss, 0).mean()


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A class for every pixel.

    Args:
      model: that is trained.
      preprocessing: of the scenes it is tested on, with the mean and std of all.
      config: the whole config of a run.
    """

    model: ActiveSegmentor
    preprocessing: ScenePreprocessing
    config: ConfigDict

    score = "mean_iou"
    score_name = "mIoU"

    @property
    def _segmenter(self) -> Segmenter:
        protocol = Protocol(size_multiple=self.config.test.size_multiple)
        return Segmenter(self.model, self.preprocessing, protocol)

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a training batch."""
        batch, size = self.config.batch_size, self.config.data.image_size
        return {
            "image": ((batch, size, size, 3), "uint8"),
            "label": ((batch, size, size), "uint8"),
            "extent": ((batch, 2), "int32"),
        }

    def inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a step trains on: images `[B, S, S, 3]` float32 and labels `[B, S, S]`.

        Padding, which is what lies beyond the `extent` (height, width) of an image, becomes 0
        after normalising.
        """
        del key
        images = normalise(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        place = jnp.arange(images.shape[1])[None]
        rows, columns = (place < batch["extent"][:, axis, None] for axis in (0, 1))
        inside = rows[:, :, None] & columns[:, None, :]
        return jnp.where(inside[..., None], images, 0), batch["label"]

    def loss(
        self, variables: Variables, inputs: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """Cross entropy, and the moved statistics; UperNet's auxiliary head counts as well."""
        images, labels = inputs
        has_aux = self.model.head == "upernet"
        applied: Any = self.model.apply(
            variables,
            images,
            train=True,
            return_aux=has_aux,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        logits, moved = applied
        if not has_aux:
            return pixel_cross_entropy(logits, labels), moved
        logits, auxiliary = logits
        loss = pixel_cross_entropy(logits, labels)
        return loss + AUXILIARY_WEIGHT * pixel_cross_entropy(auxiliary, labels), moved

    def make_test(self, mesh: Mesh, gather: Callable[[Variables], Variables]) -> Evaluation:
        """The function from weights by name and a data set to sums for `metrics`, by name.

        Args:
          mesh: of all devices.
          gather: variables as they are kept to what the model needs on each device.
        """
        settings = Settings(self.config.eval_batch_size, self.config.data.num_threads)
        return make_evaluation(self._segmenter, mesh, settings, gather)

    def label(self, variables: Variables, image: np.ndarray) -> np.ndarray:
        """The class `[H, W]` int32 of each pixel of `image` `[H, W, 3]` uint8."""
        return segment_image(self._segmenter, variables, image)

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """`mean_iou`, `mean_accuracy` and `pixel_accuracy` in percent."""
        return scene_metrics(sums["confusion"])

"""What a model is trained for: loss and metrics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from activemlp_jax.data.device import (
    draw_mixing,
    group_size,
    mix,
    mixes,
    normalise,
    random_erasing,
)
from activemlp_jax.models.backbone import ActiveMLP
from activemlp_jax.training.step import Batch, Params


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of the cross entropy of `logits` `[B, K]` to probabilities `[B, K]`."""
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an image.

    Args:
      model: whose logits are judged.
      mean: of the images, to normalise by; of the range 0 to 1.
      std: the same.
      train: what the loss needs beside: the whole config of a run; None where there is no loss.
    """

    model: ActiveMLP
    mean: Sequence[float]
    std: Sequence[float]
    train: ConfigDict | None = None

    def _logits(self, params: Params, images: jax.Array, **kwargs: Any) -> jax.Array:
        return jnp.asarray(self.model.apply({"params": params}, images, **kwargs))

    def inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a step trains on: images `[B, H, W, 3]` and targets `[B, K]`, float32.

        Images are normalised, then erased in, then mixed as are the smoothed labels.
        """
        assert self.train is not None, "a task without training settings has no loss"
        config, batch_size = self.train, len(batch["label"])
        erasing_key, mixing_key = jax.random.split(key)
        images = normalise(batch["image"], self.mean, self.std)
        if config.random_erasing:
            images = random_erasing(erasing_key, images, config.random_erasing)
        labels = jax.nn.one_hot(batch["label"], self.model.num_classes)
        targets = optax.smooth_labels(labels, config.label_smoothing)
        if mixes(config):
            mixing = draw_mixing(
                mixing_key,
                batch_size // group_size(config),
                *images.shape[1:3],
                mixup_alpha=config.mix.mixup_alpha,
                cutmix_alpha=config.mix.cutmix_alpha,
                cutmix_probability=config.mix.cutmix_probability,
            )
            images, targets = mix(images, targets, mixing)
        return images, targets

    def loss(
        self, params: Params, inputs: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> jax.Array:
        """Cross entropy to the smoothed and mixed labels of `inputs`, with drop path on."""
        images, targets = inputs
        logits = self._logits(params, images, train=True, rngs={"dropout": key})
        return soft_cross_entropy(logits, targets)

    def count(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the examples of a batch, without its padding; `metrics` makes means of them.

        Returns:
          `loss`, `top5` and `examples`, scalars, and `confusion` `[K, K]`, label by prediction.
        """
        logits = self._logits(params, normalise(batch["image"], self.mean, self.std))
        labels, mask = batch["label"], batch["mask"]
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        classes = self.model.num_classes
        _, top5 = jax.lax.top_k(logits, min(5, classes))
        confusion = jnp.zeros((classes, classes)).at[labels, logits.argmax(-1)].add(mask)
        return {
            "loss": (loss * mask).sum(),
            "top5": ((top5 == labels[:, None]).any(-1) * mask).sum(),
            "examples": mask.sum(),
            "confusion": confusion,
        }

    @staticmethod
    def metrics(sums: dict[str, Any]) -> dict[str, float]:
        """Means over a data set: `loss`, and `accuracy` and `accuracy_top5` in percent."""
        examples = float(sums["examples"])
        return {
            "loss": float(sums["loss"]) / examples,
            "accuracy": 100 * float(np.trace(sums["confusion"])) / examples,
            "accuracy_top5": 100 * float(sums["top5"]) / examples,
        }

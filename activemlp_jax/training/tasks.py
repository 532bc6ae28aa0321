"""What a model is trained for: loss and metrics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from activemlp_jax.data.device import normalise
from activemlp_jax.models.backbone import ActiveMLP
from activemlp_jax.training.step import Batch, Params


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of the cross entropy of `logits` `[B, K]` to probabilities `[B, K]`."""
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an image. `mean` and `std` normalise the images, of the range 0 to 1."""

    model: ActiveMLP
    label_smoothing: float
    mean: Sequence[float]
    std: Sequence[float]

    def _logits(self, params: Params, batch: Batch, **kwargs: Any) -> jax.Array:
        images = normalise(batch["image"], self.mean, self.std)
        return jnp.asarray(self.model.apply({"params": params}, images, **kwargs))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        """Cross entropy to the smoothed labels, with drop path on."""
        logits = self._logits(params, batch, train=True, rngs={"dropout": key})
        labels = jax.nn.one_hot(batch["label"], self.model.num_classes)
        return soft_cross_entropy(logits, optax.smooth_labels(labels, self.label_smoothing))

    def count(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the examples of a batch, without its padding; `metrics` makes means of them.

        Returns:
          `loss`, `top5` and `examples`, scalars, and `confusion` `[K, K]`, label by prediction.
        """
        logits = self._logits(params, batch)
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

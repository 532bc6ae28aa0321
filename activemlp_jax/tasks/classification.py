"""What a classifier is trained for: loss and metrics."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.base import Source
from activemlp_jax.data.batch_transforms import (
    draw_mixing,
    group_size,
    mix,
    mixes,
    normalise,
    random_erasing,
)
from activemlp_jax.data.loader import eval_batches
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.distributed import sharding
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.tasks.evaluation import Sums, evaluate
from activemlp_jax.utils.types import Batch, Variables


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of the cross entropy of `logits` `[B, K]` to probabilities `[B, K]`."""
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


@dataclasses.dataclass(frozen=True)
class Classification:
    """One label an image.

    Args:
      model: whose logits are judged.
      preprocessing: of the images it is tested on, with the mean and std of all.
      config: the whole config of a run; None where there is no training.
    """

    model: ActiveMLP
    preprocessing: Preprocessing
    config: ConfigDict | None = None

    score = "accuracy"
    score_name = "accuracy"

    def _normalise(self, images: jax.Array) -> jax.Array:
        return normalise(images, self.preprocessing.mean, self.preprocessing.std)

    def _logits(self, variables: Variables, images: jax.Array, **kwargs: Any) -> jax.Array:
        return jnp.asarray(self.model.apply(variables, images, **kwargs))

    @property
    def _settings(self) -> ConfigDict:
        assert self.config is not None, "a task without a config is not trained"
        return self.config

    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a training batch."""
        batch, size = self._settings.batch_size, self._settings.data.image_size
        return {"image": ((batch, size, size, 3), "uint8"), "label": ((batch,), "int32")}

    def inputs(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a step trains on: images `[B, H, W, 3]` and targets `[B, K]`, float32.

        Images are normalised, then erased in, then mixed as are the smoothed labels.
        """
        config, batch_size = self._settings, len(batch["label"])
        erasing_key, mixing_key = jax.random.split(key)
        images = self._normalise(batch["image"])
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
        self, variables: Variables, inputs: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """Cross entropy to the smoothed and mixed labels of `inputs`, with drop path on."""
        images, targets = inputs
        logits = self._logits(variables, images, train=True, rngs={"dropout": key})
        return soft_cross_entropy(logits, targets), {}

    def count(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the examples of a batch, without its padding; `metrics` makes means of them.

        Returns:
          `loss`, `top5` and `examples`, scalars, and `confusion` `[K, K]`, label by prediction.
        """
        logits = self._logits(variables, self._normalise(batch["image"]))
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

    def make_test(
        self, mesh: Mesh, gather: Callable[[Variables], Variables]
    ) -> Callable[[Mapping[str, Variables], Source], dict[str, Sums]]:
        """The function from weights by name and a data set to sums for `metrics`, by name.

        Args:
          mesh: of all devices.
          gather: variables as they are kept to what the model needs on each device.
        """
        config = self._settings

        def count_batch(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
            return self.count(gather(variables), batch)

        count = jax.jit(
            sharding.on_mesh(count_batch, mesh), out_shardings=sharding.replicated(mesh)
        )

        def test(weights: Mapping[str, Variables], source: Source) -> dict[str, Sums]:
            batches = eval_batches(
                source,
                self.preprocessing,
                config.eval_batch_size,
                num_threads=config.data.num_threads,
                **sharding.this_host(),
            )
            with contextlib.closing(batches):
                return evaluate(count, weights, batches, mesh)

        return test

    @staticmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Means over a data set: `loss`, and `accuracy` and `accuracy_top5` in percent."""
        examples = float(sums["examples"])
        return {
            "loss": float(sums["loss"]) / examples,
            "accuracy": 100 * float(np.trace(sums["confusion"])) / examples,
            "accuracy_top5": 100 * float(sums["top5"]) / examples,
        }

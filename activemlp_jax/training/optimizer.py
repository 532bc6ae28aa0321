"""AdamW with the original's groups of decayed weights, and learning rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def cosine_schedule(config: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Linear warm-up and cosine decay, step by step.

    The cosine counts from step 0; the warm-up covers its beginning, as in the original.

    Args:
      config: `config.optimizer`.
      steps_per_epoch: of the run.
      epochs: length of the run, over which the cosine falls.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    warmup = optax.linear_schedule(
        config.warmup_learning_rate, config.learning_rate, max(warmup_steps, 1)
    )
    cosine = optax.cosine_decay_schedule(
        config.learning_rate,
        epochs * steps_per_epoch,
        alpha=config.final_learning_rate / config.learning_rate,
    )
    return lambda step: jnp.where(step < warmup_steps, warmup(step), cosine(step))


def decay_mask(params: Any) -> Any:
    """True for the weights that decay: all but vectors, biases and position convolutions.

    Source: the original's parameter groups.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and not any(key.key == "peg" for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay; `config` is `config.optimizer`."""
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )

"""The learning rate of a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """`learning_rate`, scaled to `batch_size` where `reference_batch_size` says what it is for."""
    reference = config.reference_batch_size
    return config.learning_rate * (batch_size / reference if reference else 1.0)


def warmup_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Steps that the warm-up of `config.optimizer` takes."""
    if config.schedule == "poly":
        return config.warmup_steps
    return config.warmup_epochs * steps_per_epoch


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, steps: int, batch_size: int
) -> optax.Schedule:
    """The learning rate that `config.schedule` names: 'steps', 'epochs' or 'poly'.

    By steps, a linear warm-up and a cosine that counts from the beginning of the run; the warm-up
    covers its first epochs.

    By epochs is the original's way, exactly: the rate is constant within an epoch, and as the
    original steps its scheduler after each epoch with that epoch's number, epoch e runs at the
    rate of e - 1, and the first two at the warm-up's lowest.

    Args:
      config: `config.optimizer`.
      steps_per_epoch: of the run.
      steps: length of the run.
      batch_size: over all devices.
    """
    peak = peak_learning_rate(config, batch_size)
    if config.schedule == "poly":
        return _poly_schedule(config, peak, steps)
    if config.schedule == "epochs":
        return _epoch_schedule(config, peak, steps_per_epoch, -(-steps // steps_per_epoch))
    rising = warmup_steps(config, steps_per_epoch)
    warmup = optax.linear_schedule(config.warmup_learning_rate, peak, max(rising, 1))
    cosine = optax.cosine_decay_schedule(peak, steps, alpha=config.final_learning_rate / peak)
    return lambda step: jnp.where(step < rising, warmup(step), cosine(step))


def _poly_schedule(config: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """A straight line to the final rate; in the warm-up it is multiplied by a factor that rises.

    Source: mmcv's PolyLrUpdaterHook with power 1 and a linear warm-up.
    """
    final, lowest = config.final_learning_rate, config.warmup_learning_rate / peak
    warmup = config.warmup_steps

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, float)
        left = (steps - step) / steps  # 1 - step / steps would cancel near the end
        factor = lowest + (1 - lowest) * step / max(warmup, 1)
        return (final + (peak - final) * left) * jnp.where(step < warmup, factor, 1.0)

    return rate


def _epoch_schedule(
    config: ConfigDict, peak: float, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """A rate an epoch, looked up."""
    lowest, final, warmup = (
        config.warmup_learning_rate,
        config.final_learning_rate,
        config.warmup_epochs,
    )
    counted = np.maximum(np.arange(epochs) - 1, 0)
    rising = lowest + counted * (peak - lowest) / max(warmup, 1)
    falling = final + (peak - final) * (1 + np.cos(np.pi * counted / epochs)) / 2
    rates = np.where(counted < warmup, rising, falling)
    return lambda step: jnp.asarray(rates)[jnp.minimum(step // steps_per_epoch, epochs - 1)]

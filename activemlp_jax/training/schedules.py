"""Learning rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """Peak learning rate; if `reference_batch_size` is set, it scales with `batch_size`."""
    reference = config.reference_batch_size
    return config.learning_rate * (batch_size / reference if reference else 1.0)


def warmup_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Number of warm-up steps; `config` is `config.optimizer`."""
    if config.schedule == "poly":
        return config.warmup_steps
    return config.warmup_epochs * steps_per_epoch


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, steps: int, batch_size: int
) -> optax.Schedule:
    """Make the learning rate schedule that `config.schedule` names: 'steps', 'epochs' or 'poly'.

    'steps' is a linear warm-up and then a cosine decay. The cosine is counted from the start of the
    run, not from the end of the warm-up.

    'epochs' matches the original exactly: the rate is constant within an epoch. The original steps
    its scheduler after each epoch with that epoch's number, so epoch e has the rate for e - 1, and
    the first two epochs both have the lowest rate of the warm-up.

    'poly' is a linear decay with a linear warm-up, for segmentation.

    Args:
      config: `config.optimizer`.
      steps_per_epoch: number of steps per epoch.
      steps: number of steps of the whole run.
      batch_size: global batch size, over all devices.

    Returns:
      A function from the step to the learning rate.
    """
    peak = peak_learning_rate(config, batch_size)
    if config.schedule == "poly":
        return _poly_schedule(config, peak, steps)
    if config.schedule == "epochs":
        return _epoch_schedule(config, peak, steps_per_epoch, -(-steps // steps_per_epoch))
    warmup_length = warmup_steps(config, steps_per_epoch)
    warmup = optax.linear_schedule(config.warmup_learning_rate, peak, max(warmup_length, 1))
    cosine = optax.cosine_decay_schedule(peak, steps, alpha=config.final_learning_rate / peak)
    return lambda step: jnp.where(step < warmup_length, warmup(step), cosine(step))


def _poly_schedule(config: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Linear decay to the final rate, multiplied during the warm-up by a factor that rises to 1.

    Source: mmcv's PolyLrUpdaterHook with power 1 and a linear warm-up.
    """
    final, lowest = config.final_learning_rate, config.warmup_learning_rate / peak
    warmup = config.warmup_steps

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, float)
        remaining = (steps - step) / steps  # more exact near the end than 1 - step / steps
        factor = lowest + (1 - lowest) * step / max(warmup, 1)
        return (final + (peak - final) * remaining) * jnp.where(step < warmup, factor, 1.0)

    return rate


def _epoch_schedule(
    config: ConfigDict, peak: float, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """One rate per epoch, looked up in a table."""
    lowest, final, warmup = (
        config.warmup_learning_rate,
        config.final_learning_rate,
        config.warmup_epochs,
    )
    scheduled = np.maximum(np.arange(epochs) - 1, 0)  # the original's scheduler is one epoch late
    rising = lowest + scheduled * (peak - lowest) / max(warmup, 1)
    falling = final + (peak - final) * (1 + np.cos(np.pi * scheduled / epochs)) / 2
    rates = np.where(scheduled < warmup, rising, falling)
    return lambda step: jnp.asarray(rates)[jnp.minimum(step // steps_per_epoch, epochs - 1)]

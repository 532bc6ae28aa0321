"""Learning rate schedules: a warm-up, then a cosine or linear decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict


def peak_learning_rate(config: ConfigDict, batch_size: int) -> float:
    """Compute the peak learning rate; if there is a reference batch size, scale by the ratio."""
    reference = config.reference_batch_size
    return config.learning_rate * (batch_size / reference if reference else 1.0)


def warmup_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Return the number of warm-up steps; `config` is the section `optimizer` of a config."""
    if config.schedule == "poly":
        return config.warmup_steps
    return config.warmup_epochs * steps_per_epoch


def learning_rate_schedule(
    config: ConfigDict, steps_per_epoch: int, steps: int, batch_size: int
) -> optax.Schedule:
    """Make the learning rate schedule that `config` names; `config` is the section `optimizer`.

    `steps` is the length of the whole run, and `batch_size` counts the images on all devices.
    """
    peak = peak_learning_rate(config, batch_size)
    return SCHEDULES[config.schedule](config, peak, steps_per_epoch, steps)


def _cosine_by_step(
    config: ConfigDict, peak: float, steps_per_epoch: int, steps: int
) -> optax.Schedule:
    """Make a linear warm-up, then a cosine decay whose steps count from the start of the run."""
    warmup_length = warmup_steps(config, steps_per_epoch)
    warmup = optax.linear_schedule(config.warmup_learning_rate, peak, max(warmup_length, 1))
    cosine = optax.cosine_decay_schedule(peak, steps, alpha=config.final_learning_rate / peak)
    return lambda step: jnp.where(step < warmup_length, warmup(step), cosine(step))


def _cosine_by_epoch(
    config: ConfigDict, peak: float, steps_per_epoch: int, steps: int
) -> optax.Schedule:
    """Make the schedule of `_cosine_by_step` with one rate per epoch, exactly as the original.

    The original steps its scheduler after each epoch with the number of that epoch, from 0. So
    epoch e trains at the rate for e - 1, and the first two epochs both train at the lowest rate of
    the warm-up.
    """
    epochs, warmup = -(-steps // steps_per_epoch), config.warmup_epochs
    lowest, final = config.warmup_learning_rate, config.final_learning_rate
    scheduled = np.maximum(np.arange(epochs) - 1, 0)
    rising = lowest + scheduled * (peak - lowest) / max(warmup, 1)
    falling = final + (peak - final) * (1 + np.cos(np.pi * scheduled / epochs)) / 2
    rates = np.where(scheduled < warmup, rising, falling)
    return lambda step: jnp.asarray(rates)[jnp.minimum(step // steps_per_epoch, epochs - 1)]


def _linear(config: ConfigDict, peak: float, steps_per_epoch: int, steps: int) -> optax.Schedule:
    """Make a linear decay to the final rate, times a factor that rises to 1 during the warm-up.

    Source: mmcv's PolyLrUpdaterHook with power 1 and a linear warm-up, for segmentation.
    """
    final, lowest = config.final_learning_rate, config.warmup_learning_rate / peak
    warmup = warmup_steps(config, steps_per_epoch)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, float)
        remaining = (steps - step) / steps  # more exact near the end than 1 - step / steps
        factor = lowest + (1 - lowest) * step / max(warmup, 1)
        return (final + (peak - final) * remaining) * jnp.where(step < warmup, factor, 1.0)

    return rate


# The keys are the values of `config.optimizer.schedule`. Each function takes `config.optimizer`,
# the peak learning rate, the steps per epoch and the steps of the run.
SCHEDULES: dict[str, Callable[[ConfigDict, float, int, int], optax.Schedule]] = {
    "steps": _cosine_by_step,
    "epochs": _cosine_by_epoch,
    "poly": _linear,
}

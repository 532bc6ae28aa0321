"""How training speeds up with more devices of this machine, at equal work per device."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from activemlp_jax.data.sampler import EPOCH_MULTIPLE
from activemlp_jax.distributed import sharding
from activemlp_jax.training.init_from import draw_variables
from activemlp_jax.training.trainer import build_trainer
from activemlp_jax.utils.errors import UserError


def device_counts(most: int) -> list[int]:
    """Powers of two up to `most`, and `most` itself."""
    return sorted({most} | {2**power for power in range(most.bit_length()) if 2**power < most})


def _start(config: ConfigDict, num_classes: int, devices: Sequence[Any]) -> Callable[[int], float]:
    """Compile the step and run it once; return a function from steps to images per second."""
    config = config.copy_and_resolve_references()
    config.batch_size *= len(devices)
    config.eval_batch_size = len(devices)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    trainer = build_trainer(config, num_classes, EPOCH_MULTIPLE * config.batch_size, mesh)
    rng = np.random.default_rng(0)
    limits = {"image": 256, "label": num_classes, "extent": config.data.image_size + 1}
    drawn = {
        name: rng.integers(0, limits[name], shape, dtype)
        for name, (shape, dtype) in trainer.task.batch_shapes().items()
    }
    batch = sharding.put_batch(drawn, mesh)
    variables = jax.jit(partial(draw_variables, config, trainer.model))()
    state = trainer.first_state(sharding.put_everywhere(variables, mesh))

    def measure(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps):
            state, _ = trainer.train_step(state, batch)
        jax.block_until_ready(state)
        return steps * config.batch_size / (time.perf_counter() - started)

    measure(1)
    return measure


def measure_scaling(
    config: ConfigDict, num_classes: int, counts: Sequence[int], steps: int, rounds: int
) -> dict[int, list[float]]:
    """Time the train step on different numbers of devices, in turns.

    Args:
      config: the whole config, checked; `batch_size` is that of one device.
      num_classes: number of classes of the model.
      counts: numbers of devices.
      steps: steps per round.
      rounds: rounds of each number of devices.

    Returns:
      Images per second of each round, keyed by number of devices.

    Raises:
      UserError: the machine has fewer devices than the largest count.
    """
    devices = jax.devices()
    if max(counts) > len(devices):
        raise UserError(
            f"--devices is {max(counts)}, but there are {len(devices)} {devices[0].platform}"
        )
    measures = {count: _start(config, num_classes, devices[:count]) for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, measure in measures.items():
            rates[count].append(measure(steps))
    return rates

"""What chips can do at most, by their makers' data sheets, and what memory is in use."""

import resource
from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """Peaks of one chip.

    `flops` a second, dense, in bfloat16; `memory` in bytes; `bandwidth` of memory and
    `interconnect` to the other chips, all links together, in bytes a second.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# By JAX's device_kind. Sources: cloud.google.com/tpu/docs (system architecture of each), NVIDIA's
# data sheets of the SXM modules.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1555e9, 600e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2039e9, 600e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3350e9, 900e9),
    "NVIDIA H200": Chip(989e12, 141 * GIB, 4800e9, 900e9),
}


def peak_flops(device_kind: str, devices: int) -> float | None:
    """Of several devices together, a second; None where they are not in the table."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else chip.flops * devices


def memory_in_use() -> int:
    """Bytes: the most that a device of this host has held, or this process where they are CPUs."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in statistics if found]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

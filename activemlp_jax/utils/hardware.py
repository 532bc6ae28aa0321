"""Peak performance of chips from their data sheets, and memory in use."""

import resource
from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """Peak performance and memory of one chip."""

    flops: float  # dense bfloat16 operations per second
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    interconnect: float  # of all links to other chips together, bytes per second


# Keyed by JAX's device_kind. Sources: cloud.google.com/tpu/docs (system architecture of each TPU)
# and NVIDIA's data sheets of the SXM modules.
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
    """Return the peak operations per second of several devices, or None for an unknown kind."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else chip.flops * devices


def memory_in_use() -> int:
    """Return the peak bytes in use on this host's fullest device or, on CPUs, in this process."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in statistics if stats]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The benchmark of more devices: what it counts, and what it refuses."""

import subprocess
import sys

import pytest

from activemlp_jax.benchmark.__main__ import scaling_lines
from activemlp_jax.benchmark.scaling import device_counts

SMALL = (*("--config", "configs/digits.py", "--steps", "1", "--rounds", "1"),)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "activemlp_jax.benchmark", "scaling", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_powers_of_two_are_measured_and_the_most(most: int, counts: list[int]):
    assert device_counts(most) == counts


def test_the_share_of_ideal_is_of_so_many_times_one_devices_rate():
    one, four = scaling_lines({1: [10.0, 20.0, 30.0], 4: [50.0, 60.0, 90.0]})
    assert one.endswith("1.00 times one device's, 100% of ideal")
    assert "4 device(s)      60.0 images/s, median of 3 (50.0 to 90.0); 3.00 times" in four
    assert four.endswith("75% of ideal")


@pytest.mark.slow
def test_a_number_of_devices_gets_its_line():
    result = benchmark(*SMALL, "--devices", "1")
    assert result.returncode == 0, result.stderr
    head, one = result.stdout.splitlines()
    assert head.startswith("configs/digits.py, 32 images a step and device, cpu")
    assert "1 device(s)" in one
    assert "100% of ideal" in one


@pytest.mark.parametrize("option", ["devices", "steps", "rounds"])
def test_nothing_to_measure_is_one_clear_line(option: str):
    result = benchmark(*SMALL, "--devices", "2", f"--{option}", "0")
    assert result.returncode == 2
    assert result.stderr.strip() == f"benchmark: error: --{option} is 0, expected at least 1"

"""Costs counted from shapes, compared with the published figures."""

import subprocess
import sys

import pytest

import activemlp_jax as am
from activemlp_jax.models.flops import count_cost

# name, side, GMACs of convolutions and linears, GMACs as published
FIGURES = [
    ("active_xtiny", 224, 2.168, 2.180),
    ("active_tiny", 224, 3.954, 3.972),
    ("active_small", 224, 6.888, 6.913),
    ("active_base", 224, 10.113, 10.148),
    ("active_large", 224, 12.348, 12.386),
    ("active_large", 384, 36.276, 36.388),
]


@pytest.mark.parametrize(("name", "size", "conv_and_linear", "published"), FIGURES)
def test_multiply_adds_are_the_published_ones(
    name: str, size: int, conv_and_linear: float, published: float
):
    cost = count_cost(am.create_model(name), size, size)
    assert round(cost.macs / 1e9, 3) == conv_and_linear
    assert round(cost.published_macs / 1e9, 3) == published


def test_multiply_adds_of_one_block_by_hand():
    model = am.ActiveMLP((2, 2, 2, 2), (8, 8, 8, 8), (2, 2, 2, 2), (2, 2, 2, 2), 1, num_classes=3)
    positions = [8 * 8, 4 * 4, 2 * 2, 1]
    stem = 64 * 7 * 7 * 3 * 8
    downs = sum(n * 9 * 8 * 8 for n in positions[1:])
    per_position = 4 * 8 * 8 + 2 * 8 * 16  # layers w, h, c and proj, then the MLP
    blocks = 2 * sum(n * per_position + 8 * 2 + 2 * 24 for n in positions)
    offsets = sum(n * (9 * 8 + 8 * 8) for n in positions)  # PEG, offset layer
    cost = count_cost(model, 32, 32)
    assert cost.macs == stem + downs + blocks + offsets + 8 * 3
    norms = sum(5 * n * 8 for n in positions) + 8
    assert cost.published_macs == cost.macs + 5 * norms


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "activemlp_jax.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_the_table():
    result = benchmark("table", "--model", "active_large", "--image-size", "384")
    assert result.returncode == 0, result.stderr
    for figure in ("active_large", "76,238,032", "36.276", "36.388"):
        assert figure in result.stdout


def test_the_command_prints_segmentation_models_at_any_size():
    options = ("--model", "active_xtiny", "--head", "upernet", "--image-size", "512x2048")
    result = benchmark("table", *options)
    assert result.returncode == 0, result.stderr
    for figure in ("512 x 2048, upernet, 150 classes", "45,325,004", "887.710"):
        assert figure in result.stdout


def test_the_command_explains_itself_and_refuses_small_images():
    assert "python -m activemlp_jax.benchmark table" in benchmark("--help").stdout
    result = benchmark("table", "--image-size", "512 by 2048")
    assert result.returncode == 2
    assert "--image-size is '512 by 2048', expected a side, or HEIGHTxWIDTH" in result.stderr
    result = benchmark("table", "--image-size", "31")
    assert result.returncode == 2
    assert "--image-size is 31, expected at least 32" in result.stderr
    assert "Traceback" not in result.stderr

"""The benchmark of the input side compares like with like."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT

from activemlp_jax.benchmark.loading import plain_batches
from activemlp_jax.data.loader import train_batches
from activemlp_jax.data.sources import PhotosSource
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.training.cli_flags import load_config


@pytest.mark.parametrize("randaugment", ["rand-m9-mstd0.5-inc1", ""])
def test_plain_pillow_gives_the_same_batches_pixel_for_pixel(randaugment: str):
    config = load_config(f"{ROOT}/configs/imagenet.py")
    config.batch_size = 32
    config.augment.mix_group_size = 8
    config.data.num_threads = 2
    config.augment.rand_augment = randaugment
    source = PhotosSource(300)
    with (
        contextlib.closing(
            train_batches(source, Classification.transform, config, first_step=7, last_step=10)
        ) as ours,
        contextlib.closing(plain_batches(source, config, 7, 10)) as plain,
    ):
        count = 0
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])
            count += 1
    assert count == 3


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "activemlp_jax.benchmark", "data", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_benchmark_prints_both_rates_and_their_ratio():
    result = benchmark(
        *("--config", "configs/throughput.py", "--batch-size", "32"),
        *("--steps", "1", "--rounds", "1", "--num-threads", "1"),
    )
    assert result.returncode == 0, result.stderr
    heading, ours, plain, ratio = result.stdout.splitlines()
    assert heading == "photos:10240: 32 images of 224 x 224 a batch, 1 thread(s)"
    assert ours.startswith("this pipeline")
    assert plain.startswith("plain Pillow")
    assert float(ratio.split()[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing.py"], "there is no config file nothing.py"),
        (["--config", "configs/digits.py"], "does not train on random crops of image files"),
        (["--config", "configs/throughput.py", "--steps", "0"], "--steps is 0, expected at least"),
        (["--config", "configs/throughput.py", "--batch-size", "0"], "--batch-size is 0, expected"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(arguments: list[str], message: str):
    result = benchmark(*arguments)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert message in result.stderr

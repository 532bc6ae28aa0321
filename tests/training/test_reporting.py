"""Reports of a run to files, the terminal and other trackers."""

import io
from pathlib import Path
from typing import Any

import pytest
from processes import lines
from rich.console import Console

from activemlp_jax.training.config import default_config
from activemlp_jax.training.reporting import (
    Reporter,
    Work,
    describe_length,
    lagging_average,
)
from activemlp_jax.utils.hardware import CHIPS, peak_flops


def report(workdir: Path | None, peak: float | None = None) -> tuple[list[dict[str, Any]], str]:
    """Report ten steps, recording every fourth, and an epoch; return tracker records and log."""
    config = default_config()
    config.log_every_steps = 4
    tracked: list[dict[str, Any]] = []
    printed = io.StringIO()
    work = Work(0, 20, 2, 32, flops=1e9, peak_flops=peak)
    console = Console(file=printed, width=200)
    with Reporter(workdir, work, config, console, [tracked.append]) as reporter:
        reporter.start_epoch(1, 0)
        for step in range(1, 11):
            reporter.step(step, {"loss": 1 / step})
        reporter.epoch({"epoch": 1, "step": 10, "train_loss": 0.5, "test_loss": 0.25})
    return tracked, printed.getvalue()


def test_trackers_get_what_the_files_get(tmp_path: Path):
    tracked, _ = report(tmp_path)
    assert [record["step"] for record in tracked] == [4, 8, 10]
    assert tracked[0]["loss"] == 1 / 4
    assert tracked[:2] == lines(tmp_path / "steps.jsonl")
    assert tracked[2:] == lines(tmp_path / "metrics.jsonl")


def test_a_log_shows_loss_speed_memory_and_the_time_that_is_left(tmp_path: Path):
    _, printed = report(tmp_path)
    step, _, epoch = printed.splitlines()
    for part in ("epoch 1/2  step 4/20  loss 0.2500", "images/s", "GiB", "left"):
        assert part in step
    assert "MFU" not in step
    assert "loss 0.5000  test loss 0.2500" in epoch


def test_mfu_is_the_share_of_what_the_devices_can_do(tmp_path: Path):
    tracked, printed = report(tmp_path, peak=1e15)
    for record in tracked[:2]:
        flops = record["images_per_second"] / 32 * 1e9
        assert record["mfu"] == pytest.approx(100 * flops / 1e15, abs=0.01)
    assert "MFU" in printed
    assert peak_flops("TPU v5 lite", 16) == 16 * CHIPS["TPU v5 lite"].flops
    assert peak_flops("cpu", 16) is None


@pytest.mark.parametrize(
    ("batch_size", "reference", "peak"),
    [(8, 0, "1.0e-04"), (16, 64, "2.5e-05"), (64, 32, "2.0e-04")],
)
def test_a_run_tells_its_length_and_the_learning_rate_after_scaling(
    batch_size: int, reference: int, peak: str
):
    config = default_config()
    config.batch_size = batch_size
    config.optimizer.learning_rate = 1e-4
    config.optimizer.reference_batch_size = reference
    expected = f"8 steps an epoch, 2,000 in all, learning rate up to {peak}"
    assert describe_length(config, 8, 2000) == expected


@pytest.mark.parametrize(("batch_size", "lower"), [(64, 16), (3, 1), (1, None)])
def test_a_run_of_one_step_an_epoch_says_what_to_lower(batch_size: int, lower: int | None):
    config = default_config()
    config.batch_size = batch_size
    told = describe_length(config, 1, 30)
    assert told.startswith("1 step an epoch, 30 in all, learning rate up to 5.0e-04")
    advice = f"config.batch_size is {batch_size}, more than half of an epoch; lower it"
    assert (advice in told) == (lower is not None), told
    assert told.endswith(f"example with --config.batch_size={lower}") == (lower is not None), told


@pytest.mark.parametrize(
    ("schedule", "rising"), [("steps", "40"), ("epochs", "40"), ("poly", "1,500")]
)
def test_a_run_tells_that_its_warm_up_is_longer_than_itself(schedule: str, rising: str):
    config = default_config()  # its warm-up has five epochs, or 1,500 steps
    config.optimizer.schedule = schedule
    steps = int(rising.replace(",", ""))
    told = f"but its warm-up takes {rising} steps, more than the run"
    assert told in describe_length(config, 8, steps - 1)
    assert told not in describe_length(config, 8, steps)


@pytest.mark.parametrize(
    ("raw", "averaged", "images", "lags"),
    [
        (75.0, 50.0, 12, True),
        (58.3, 50.0, 12, False),  # one image
        (97.5, 92.0, 360, True),
        (97.5, 93.0, 360, False),
        (50.0, 75.0, 12, False),
        (75.0, None, 12, False),  # no average is kept
    ],
)
def test_an_average_that_is_far_worse_than_its_weights_is_told(
    raw: float, averaged: float | None, images: int, lags: bool
):
    config = default_config()
    record = {"test_accuracy": raw}
    if averaged is not None:
        record["ema_test_accuracy"] = averaged
    line = lagging_average(config, record, "accuracy", images)
    assert (line is not None) == lags
    if line is not None:
        assert f"{averaged:.2f}%, those of the last step {raw:.2f}%; set --config.ema_warm" in line
        config.ema_warmup = True
        warm = lagging_average(config, record, "accuracy", images)
        assert warm is not None
        assert "ema_warmup" not in warm
        assert "; lower config.ema_decay, which is 0.99996" in warm


def test_a_host_that_does_not_speak_leaves_nothing(tmp_path: Path):
    tracked, printed = report(None)
    assert (tracked, printed) == ([], "")
    assert not list(tmp_path.iterdir())

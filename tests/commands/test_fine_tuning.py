"""Weights learned on letters survive a conversion to PyTorch and back, and help with digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    # These runs are so long that compiler optimizations pay off.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def last_accuracy(workdir: Path) -> float:
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]


@pytest.mark.slow
@pytest.mark.xdist_group("recipe")  # groups start first, and this test takes long
def test_fine_tuning_from_converted_letters_beats_random_weights(tmp_path: Path):
    folder, letters = tmp_path / "images", tmp_path / "letters"
    short = "--config.optimizer.warmup_epochs=1"
    run("examples/draw_letters.py", str(folder))
    run(
        "train.py", f"--workdir={letters}", f"--config.data.name=folder:{folder}",
        "--config.data.test_split=val", "--config.epochs=6", short,
    )  # fmt: skip
    run("convert_torch_weights.py", str(letters / "model"), str(tmp_path / "l.pth"), "--to-torch")
    converted = tmp_path / "converted"
    run("convert_torch_weights.py", str(tmp_path / "l.pth"), str(converted))

    tuned, scratch = tmp_path / "tuned", tmp_path / "scratch"
    # The same program, which is compiled once.
    fine_tune = ("train.py", "--config=configs/digits_fine_tune.py", "--config.epochs=3", short)
    output = run(*fine_tune, f"--workdir={tuned}", f"--config.init_from={converted}")
    assert "head re-initialized, 26 classes there and 10 here" in output
    run(*fine_tune, f"--workdir={scratch}")
    ours, theirs = last_accuracy(tuned), last_accuracy(scratch)
    assert ours > theirs + 2, f"{ours:.2f}% from letters, {theirs:.2f}% from random weights"
    assert ours > 93, f"{ours:.2f}%"

"""The measuring commands of the benchmark, run at small sizes and with bad input."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import error_line
from small_models import BACKBONE

from activemlp_jax.benchmark import __main__ as command
from activemlp_jax.benchmark.timing import COLUMNS
from activemlp_jax.models.active_mlp import VARIANTS
from activemlp_jax.ops.sample_axis import NAMES
from activemlp_jax.utils.errors import UserError

ROOT = Path(__file__).parents[2]
MICRO = {**BACKBONE, "share_dims": (2, 4, 4, 8)}

QUICK = ("--image-size", "32", "--batch-size", "1", "--rounds", "2", "--steps", "1")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    process = [sys.executable, "-m", "activemlp_jax.benchmark", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(process, capture_output=True, text=True, timeout=300, env=environment)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(tuple(row) == COLUMNS for row in rows)
    return rows


@pytest.mark.slow
def test_the_operator_is_timed_at_every_stage_by_every_implementation(tmp_path: Path):
    path = tmp_path / "op.csv"
    result = benchmark("op", *QUICK, "--csv", str(path))
    assert result.returncode == 0, result.stderr
    assert "active_tiny stage 1, 8 x 8, 64 channels, 2 an offset, along h" in result.stdout
    assert "active_tiny stage 4, 1 x 1, 512 channels, 8 an offset, along w" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    copies = [row for row in rows_of(path) if row["what"] == "copy"]
    assert [float(row["copy_fraction"]) for row in copies] == [1] * 8  # one per table
    rows = [row for row in rows_of(path) if row["what"] != "copy"]
    assert all(float(row["copy_fraction"]) > 0 for row in rows)
    found = {(row["model"], row["what"], row["implementation"]) for row in rows}
    left_out = {name for name in NAMES if f"without jax {name}" in result.stdout}
    assert found == {
        (f"active_tiny stage {stage}", f"{axis} {what}", f"jax {name}")
        for stage in (1, 2, 3, 4)
        for axis in ("h", "w")
        for what in ("forward", "forward+backward")
        for name in NAMES
        if name not in left_out
    }


@pytest.mark.slow
def test_a_model_is_timed_beside_a_matrix_product(tmp_path: Path):
    path = tmp_path / "model.csv"
    result = benchmark("model", *QUICK, "--model", "active_xtiny", "--csv", str(path))
    assert result.returncode == 0, result.stderr
    assert "active_xtiny, 1 images of 32 x 32 in float32" in result.stdout
    product, ours = rows_of(path)
    assert (product["what"], product["model"], product["dtype"]) == (
        *("matmul", "2048 x 2048", "float32"),
    )
    assert (ours["what"], ours["model"], ours["implementation"]) == (
        *("forward", "active_xtiny", "jax"),
    )
    assert 0 < float(ours["matmul_fraction"]) < 1
    assert float(ours["memory_bytes"]) > 4 * 15_000_000  # bytes of the weights
    assert ours["torch_version"] == ""


@pytest.mark.slow
@pytest.mark.xdist_group("step of micro")  # the second run finds the program in JAX's cache
@pytest.mark.parametrize("whats", [("gradient", "step"), ("step",)])
def test_training_is_timed_by_gradient_and_step_or_one_of_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whats: tuple[str, ...],
):
    monkeypatch.setitem(VARIANTS, "micro", MICRO)
    path = tmp_path / "train.csv"
    only = ["--only", whats[0]] if len(whats) == 1 else []
    size = ["--batch-size", "2", "--image-size", "32", "--rounds", "2", "--steps", "1"]
    words = ["train", "--model", "micro", *only, *size, "--csv", str(path)]
    options = command.make_parser().parse_args(words)
    options.run(options)
    rows = rows_of(path)
    assert [row["what"] for row in rows] == ["matmul", *whats]
    memory = [float(row["memory_bytes"]) for row in rows[1:]]
    assert memory == sorted(set(memory))  # a step also holds moments and the average
    assert "2 rounds of 1, in turns" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "heading"),
    [
        ("throughput", "photos:10240: 32 images of 224 x 224 a batch, 1 thread(s)"),
        ("digit_scenes", "digit_scenes: 32 images of 64 x 64 a batch, 1 thread(s)"),
    ],
)
def test_the_loader_is_timed_alone(config: str, heading: str):
    size = ("--batch-size", "32", "--steps", "1", "--rounds", "1", "--num-threads", "1")
    result = benchmark("data", "--config", f"configs/{config}.py", *size)
    assert result.returncode == 0, result.stderr
    first, rate = result.stdout.splitlines()
    assert first == heading
    assert re.fullmatch(r"this pipeline +[\d,]+ images/s, median of 1 \([\d,]+ to [\d,]+\)", rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["op", "--steps", "0"], "--steps is 0, expected at least 1"),
        (["train", "--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["model", "--model", "active_huge"], "no model 'active_huge', expected one of active_b"),
        (["op", "--deviation", "-1"], "--deviation is -1.0, expected at least 0"),
        (["op", "--image-size", "31"], "--image-size is 31, expected at least 32"),
        (
            ["model", "--model", "active_xtiny", "--csv", f"{__file__}/place.csv"],
            "test_benchmark.py is not a folder",
        ),
        (["op", "--csv", "/"], "/ cannot be written: it is a folder"),
        (["data", "--config", "nothing.py"], "there is no config file nothing.py"),
        (["data", "--config", "configs/digits.py", "--steps", "0"], "--steps is 0, expected at"),
        (["data", "--config", "configs/digits.py", "--batch-size", "0"], "--batch-size is 0, exp"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(arguments: list[str], message: str):
    assert message in error_line(command.main, *arguments)


def test_a_missing_pytorch_or_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and there is no no-such-comp"):
        command.load_torch_peer()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"PyTorch: pip install -c .* -e '\.\[torch\]'"):
        command.load_torch_peer()


def test_a_comparison_needs_the_file_of_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CXX", sys.executable)
    package = tmp_path / "site-packages" / "activemlp_jax" / "benchmark"
    monkeypatch.setattr(command, "__file__", str(package / "__main__.py"))
    monkeypatch.chdir(ROOT)
    assert command.load_torch_peer().__file__ == str(ROOT / "benchmarks" / "torch_peer.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--compare needs benchmarks/torch_peer.py of this proj"):
        command.load_torch_peer()

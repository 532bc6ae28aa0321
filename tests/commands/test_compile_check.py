"""`python -m activemlp_jax.compile_check`: compiles a step for devices that are not there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import jax
import pytest
from commands import error_line
from processes import ROOT

from activemlp_jax import ActiveMLP, compile_check
from activemlp_jax.distributed.sharding import make_mesh
from activemlp_jax.models.flops import count_cost
from activemlp_jax.training.cli_flags import load_config
from activemlp_jax.training.trainer import build_trainer

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own

# `make test` installs the TPU compiler here; an environment with [tpu] has its own.
LIBRARY = ROOT / ".cache" / "libtpu" / "libtpu" / "libtpu.so"

SMALL = (
    "--config=configs/digits.py",
    "--config.model.embed_dims=(16,32,64,64)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
)
MODEL = ActiveMLP((2, 2, 2, 2), (16, 32, 64, 64), (2, 2, 2, 2), (2, 4, 4, 8), 2, num_classes=10)
OPEN_TOPOLOGY = compile_check.open_topology
PARAMETERS = 4 * count_cost(MODEL, 32, 32).parameters  # bytes


def run(*arguments: str) -> str:
    """Run the command as a process and return its output."""
    variables = {"TPU_LIBRARY_PATH": str(LIBRARY)} if LIBRARY.exists() else {}
    result = subprocess.run(
        [sys.executable, "-m", "activemlp_jax.compile_check", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def found(*arguments: str) -> tuple[str, dict[str, Any]]:
    """Return the printed text, and the JSON record on its last line."""
    output = run(*SMALL, *arguments)
    return output, json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_a_step_on_eight_devices_sums_one_gradient_of_every_parameter():
    output, record = found("--topology=cpu:8")
    assert "configs/digits.py on cpu:8: 8 cpu of 1 host(s), mesh data 8, fsdp 1" in output
    assert "32 images a step, 4 a device; 1,437 images in 10 classes, of digits" in output
    assert set(record["collectives"]) == {"all-reduce"}
    assert record["collectives"]["all-reduce"]["size"] == pytest.approx(PARAMETERS, rel=0.01)
    # The state has the weights, their average, and two moments.
    assert record["arguments"] == pytest.approx(4 * PARAMETERS, rel=0.05)
    assert record["fits"] is None


@pytest.mark.slow
@pytest.mark.skipif(
    not LIBRARY.exists() and importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed",
)
def test_the_compiler_for_tpus_compiles_a_step_for_a_slice_that_is_not_here():
    output, record = found("--topology=v5e:2x2", "--config.data.name=tfds:nowhere", "--classes=20")
    assert "4 TPU v5 lite of 1 host(s), mesh data 4, fsdp 1" in output
    assert "1,281,167 images in 20 classes, in part as given" in output
    assert record["fits"] is True
    assert (record["gathers"], record["scatters"]) == (0, 0), "slow on a TPU"
    assert 0 < record["memory"] < 2**30
    assert record["collectives"]["all-reduce"]["size"] > 0.9 * PARAMETERS
    assert all(seconds > 0 for seconds in record["least_seconds"].values())


@pytest.mark.parametrize("name", ["active_xtiny", "active_tiny"])
def test_on_tpus_the_step_of_a_recipe_reads_and_writes_nothing_by_index(name: str):
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    program = build_trainer(config, 1000, 1_281_167, make_mesh(devices=jax.devices()[:1]))
    traced = program.train_step.trace(program.state, program.batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text, "the operator's kernels"
    assert not re.findall(r"stablehlo\.\w*(?:gather|scatter)", text)


def open_here(name: str) -> list[Any]:
    """Return the devices of a topology in a process in which JAX is already in use."""
    if re.fullmatch(r"cpu:[1-9]", name):
        return [jax.devices()[0]] * int(name[4:])
    with mock.patch.object(jax.config, "update"):
        return OPEN_TOPOLOGY(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing, expected a config file such as configs/digits.py"),
        (["--config=nothing.py"], "there is no config file nothing.py"),
        ([*SMALL], "--topology is missing, expected a TPU slice as v5e:4x4, or cpu:8"),
        ([*SMALL, "--topology=v5e"], "--topology is 'v5e', expected a TPU slice as v5e:4x4, or"),
        ([*SMALL, "--topology=cpu:0"], "--topology is 'cpu:0', expected a TPU slice"),
        (
            [*SMALL, "--topology=cpu:8", "--config.mesh.fsdp=3"],
            "config.mesh is all x 3 (data x fsdp), which the 8 devices do not fill",
        ),
        ([*SMALL, "--topology=cpu:8", "--images=0"], "--images is 0, expected at least 1"),
        (
            [*SMALL, "--topology=cpu:8", f"--classes={10**9}"],
            "--classes is 1000000000, expected at most 1,048,576",
        ),
        ([*SMALL, "--topology=cpu:8", "--images=20"], "only 20 images"),
        ([*SMALL, "--topology=cpu:8", "--config.bath_size=8"], "did you mean config.batch_size?"),
    ],
)
def test_what_cannot_be_compiled_is_one_clear_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compile_check, "open_topology", open_here)
    assert message in error_line(compile_check.main, *arguments)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed"
)
def test_a_missing_compiler_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(compile_check, "open_topology", open_here)
    line = error_line(compile_check.main, *SMALL, "--topology=v5e:4x4")
    assert "compiler for TPUs is not installed" in line
    assert "pip install -c constraints.txt -e '.[tpu]'" in line


def test_help_shows_examples():
    output = run("--help")  # absl shows the docstring of the program
    assert "--config configs/active_tiny.py --topology v5e:4x4" in output
    for name in ("topology", "images", "classes"):
        assert f"--{name} {name.upper()}" in output
    assert "--config.mesh.fsdp=1" in output

"""Options of commands have limits, and a wrong command line gives one line."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import error_line, run_main
from processes import ROOT

from activemlp_jax import __main__, embed, evaluate, predict, prepare_data
from activemlp_jax.benchmark import __main__ as benchmark
from activemlp_jax.command_line import LIMITS, check_numbers
from activemlp_jax.export import __main__ as export
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights import convert


@pytest.mark.parametrize("name", LIMITS)
def test_a_number_beyond_its_limits_is_named_with_what_was_expected(name: str):
    low, high = LIMITS[name]
    check_numbers({name: low, "directory": "models"})
    check_numbers({name: high})
    check_numbers({name: None})
    option = f"--{name.replace('_', '-')}"
    for value, expected in ((low - 1, "at least"), (10**30, "at most"), (math.nan, "at least")):
        with pytest.raises(UserError, match=f"^{option} is .*, expected {expected} "):
            check_numbers({name: value})


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (predict.main, ["MODEL"], "the following arguments are required: IMAGE"),
        (predict.main, ["MODEL", "a.png", "--token", "nan,nan"], "'nan,nan', expected X,Y"),
        (predict.main, ["MODEL", "a.png", "--opacity", "half"], "invalid float value: 'half'"),
        (evaluate.main, ["MODEL", "--data", "digits", "--timeout", "1h"], "invalid int value"),
        (evaluate.main, ["MODEL", "--data", "digits", "--batch-size", "1e3"], "invalid int value"),
        (evaluate.main, ["MODEL", "--data", "digits", "--batch-size", f"{10**12}"], "at most 1,04"),
        (evaluate.main, ["MODEL", "--data", "digits", "--num-threads", f"{10**9}"], "most 1,024"),
        (evaluate.main, ["MODEL", "--data", "digits", "--image-size", f"{10**9}"], "most 16,384"),
        (evaluate.main, ["MODEL", "--data", "digits", "--size-multiple", "0"], "at least 1"),
        (embed.main, ["MODEL", "a.png"], "the following arguments are required: --output"),
        (export.main, ["MODEL", "OUT", "--format", "pickle"], "invalid choice: 'pickle'"),
        (prepare_data.main, ["folder", ".", "a", "--num-threads", f"{10**9}"], "at most 1,024"),
        (benchmark.main, ["table", "--image-size", f"224x{10**8}"], "at most 16,384"),
        (benchmark.main, ["table", "--image-size", "9" * 5000], "expected a side, or HEIGHTxWIDTH"),
        (benchmark.main, ["op", "--deviation", "nan"], "--deviation is nan, expected at least 0"),
        (benchmark.main, ["op", "--deviation", "inf"], "--deviation is inf, expected at most"),
        (benchmark.main, ["model", "--rounds", f"{10**9}"], "--rounds is 1000000000, expected at"),
        (benchmark.main, ["model", "--batch-size", f"{10**12}"], "expected at most 1,048,576"),
        (benchmark.main, ["data", "--config", "no.py", "--num-workers", "2000"], "most 1,024"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_work_is_one_clear_line(
    main: Any, arguments: list[str], message: str
):
    assert message in error_line(main, *arguments)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train.py", ["--config.batchsize=8"], "did you mean config.batch_size?"),
        ("convert_torch_weights.py", ["no.pth", "out"], "there is no file no.pth"),
        ("predict", ["no", "a.png"], "no is not a model directory"),
        ("evaluate", ["no", "--data", "digits"], "no is not a model directory"),
        ("embed", ["no", "a.png", "--output", "a.npz"], "no is not a model directory"),
        ("export", ["no", "out"], "no is not a model directory"),
        ("prepare_data", ["folder", "no", "name"], "there is no folder"),
        ("benchmark", ["op", "--steps", "0"], "--steps is 0, expected at least 1"),
        (
            "compile_check",
            ["--config=configs/digits.py", "--topology=cpu:3"],
            "config.batch_size is 32, expected a multiple of 3: there are 3 devices",
        ),
    ],
)
def test_a_process_exits_with_status_2_and_one_line(
    program: str, arguments: list[str], message: str
):
    name = program if program.endswith(".py") else f"-m activemlp_jax.{program}"
    result = subprocess.run(
        [sys.executable, *name.split(), *arguments],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(program)
    assert message in line


@pytest.mark.parametrize(
    "main",
    [
        benchmark.main, convert.main, embed.main, evaluate.main, export.main, predict.main,
        prepare_data.main,
    ],
)  # fmt: skip
def test_help_shows_examples(main: Any):
    result = run_main(main, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search("^Examples:\n  python ", result.stdout, re.MULTILINE)


def test_a_file_system_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    def fail(_: str) -> None:
        raise OSError(5, "Input/output error", "models/tiny/model.json")

    monkeypatch.setattr(evaluate, "read_card", fail)
    line = error_line(evaluate.main, "models/tiny", "--data", "digits")
    assert line == "command: error: models/tiny/model.json: Input/output error"


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]):
    __main__.main()
    listed = re.findall(r"^python -m activemlp_jax\.(\w+)", capsys.readouterr().out, re.MULTILINE)
    package = Path(evaluate.__file__).parent
    commands = [file.stem for file in package.glob("*.py") if "\ndef main()" in file.read_text()]
    commands += [file.parent.name for file in package.glob("*/__main__.py")]
    assert sorted(listed) == sorted(set(commands) - {"__main__"})

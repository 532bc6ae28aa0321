"""The real `train.py` as a process: a run, a kill, a resume, and every wrong command line."""

import ast
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from processes import ROOT, SMALL, lines, run, saved_state, start
from rich.console import Console

import activemlp_jax as am
from activemlp_jax.training import cli_flags, loop
from activemlp_jax.training.cli_flags import load_config
from activemlp_jax.training.config import flatten
from activemlp_jax.training.trainer import Trainer
from activemlp_jax.utils.errors import UserError

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("train")

EPOCH_STEPS = 3


def small_run(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    result = run("--workdir", str(workdir), *SMALL, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def records(workdir: Path) -> list[dict[str, Any]]:
    return lines(workdir / "metrics.jsonl")


def final_state(workdir: Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint: weights, their average, optimizer, step."""
    assert not (workdir / "checkpoints" / str(4 * EPOCH_STEPS + 1)).exists()
    return jax.tree.leaves(saved_state(workdir, 4 * EPOCH_STEPS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train four epochs without interruption, tracing some steps; return workdir and output."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, small_run(workdir, "--config.tensorboard", "--config.profile=2").stdout


class Interruption(NamedTuple):
    """How an interrupted process ended, and the steps of the checkpoints it left."""

    status: int
    output: str
    errors: str
    saved: list[int]


class Interrupted(NamedTuple):
    """A run that was started several times, and the output of its last start."""

    workdir: Path
    full_disk: Interruption
    stopped: dict[signal.Signals, Interruption]
    killed: Interruption
    output: str


def saved_steps(workdir: Path) -> list[int]:
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


@pytest.fixture(scope="module")
def interrupted(
    finished: tuple[Path, str],  # has filled the compilation cache
    tmp_path_factory: pytest.TempPathFactory,
) -> Interrupted:
    """Train again, ended by a full disk, SIGTERM, SIGINT and SIGKILL in turn, and then finish."""
    del finished
    workdir = tmp_path_factory.mktemp("runs") / "interrupted"
    arguments = ("--workdir", str(workdir), *SMALL)

    def ended(process: subprocess.Popen[str]) -> Interruption:
        output, errors = process.communicate(timeout=240)
        return Interruption(process.returncode, output, errors, saved_steps(workdir))

    def end(number: signal.Signals, is_time: Callable[[], bool], *flags: str) -> Interruption:
        process = start(*arguments, *flags)
        deadline = time.monotonic() + 240
        while not is_time():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"no time for {number.name} within four minutes"
            time.sleep(0.005)
        process.send_signal(number)
        return ended(process)

    def steps() -> int:
        path = workdir / "steps.jsonl"
        return len(lines(path)) if path.exists() else 0

    # A limit on file sizes simulates a full disk: writing fails in the same places.
    limited = ("sh", "-c", 'ulimit -f 200; exec "$@"', "sh")
    full_disk = ended(start(*arguments, "--config.checkpoint.every_steps=1", prefix=limited))
    stopped = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before = steps()
        stopped[number] = end(
            number, lambda before=before: steps() > before, "--config.checkpoint.every_epochs=4"
        )
    newest = max(saved_steps(workdir))
    killed = end(signal.SIGKILL, lambda: max(saved_steps(workdir)) > newest)
    return Interrupted(workdir, full_disk, stopped, killed, small_run(workdir).stdout)


@pytest.mark.slow
def test_a_run_leaves_its_record_its_pictures_and_its_checkpoints(finished: tuple[Path, str]):
    workdir, output = finished
    assert "360 images to train, 360 to test" in output
    assert "\n3 steps an epoch, 12 in all, learning rate up to 2.0e-03\n" in output
    assert "test images" in output
    names = {path.name for path in workdir.iterdir()}
    assert names - {".lock", "best_model"} == {
        "checkpoints",
        "config.json",
        "confusion_matrix.png",
        "curves.png",
        "metrics.jsonl",
        "model",
        "profile",
        "steps.jsonl",
        "tensorboard",
    }
    lines = records(workdir)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    for key in ("learning_rate", "test_loss", "test_accuracy", "ema_test_accuracy"):
        assert all(np.isfinite(line[key]) for line in lines), key
    for name in ("curves.png", "confusion_matrix.png"):
        assert (workdir / name).read_bytes()[:4] == b"\x89PNG"
    assert any((workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_run_leaves_a_model_directory_of_its_last_state(finished: tuple[Path, str]):
    workdir, _ = finished
    state = saved_state(workdir, 4 * EPOCH_STEPS)
    for kind, key in (("ema", "ema"), ("model", "variables")):
        _, variables = am.load_pretrained(workdir / "model", kind)
        jax.tree.map(np.testing.assert_array_equal, variables, state[key])
    result = subprocess.run(
        [sys.executable, "-m", "activemlp_jax.evaluate", workdir / "model", "--data", "digits"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    evaluated, last = json.loads(result.stdout.splitlines()[-1]), records(workdir)[-1]
    assert evaluated["model"]["acc1"] == pytest.approx(last["test_accuracy"], abs=1e-9)
    assert evaluated["ema"]["acc1"] == pytest.approx(last["ema_test_accuracy"], abs=1e-9)


def assert_as_untouched(workdir: Path, expected: Path) -> None:
    """Assert that two runs have bitwise equal weights, and equal records."""
    ours, theirs = final_state(workdir), final_state(expected)
    assert len(ours) == len(theirs) > 500
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("metrics.jsonl", "steps.jsonl"):
        ours, theirs = lines(workdir / name), lines(expected / name)
        for line in (*ours, *theirs):
            del line["images_per_second"]
            line.pop("memory_gib", None)
        assert ours == theirs, name


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_at_the_same_weights_bit_for_bit(
    finished: tuple[Path, str], interrupted: Interrupted
):
    assert interrupted.killed.status == -signal.SIGKILL
    step = max(interrupted.killed.saved)
    assert 0 < step < 4 * EPOCH_STEPS
    assert f"going on from step {step} of 12" in interrupted.output
    assert_as_untouched(interrupted.workdir, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_run_that_is_asked_to_stop_saves_and_loses_nothing(
    number: signal.Signals, status: int, finished: tuple[Path, str], interrupted: Interrupted
):
    stop = interrupted.stopped[number]
    assert stop.status == status, stop.errors
    assert "stopping after this step" in stop.output
    assert "the same command goes on from there" in stop.output
    step = max(stop.saved)
    assert f"stopped after step {step};" in stop.output
    assert 0 < step < 4 * EPOCH_STEPS

    following = {
        signal.SIGTERM: interrupted.stopped[signal.SIGINT],
        signal.SIGINT: interrupted.killed,
    }
    assert f"going on from step {step} of 12" in following[number].output
    assert_as_untouched(interrupted.workdir, finished[0])


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_clear_line(interrupted: Interrupted):
    """Once there is room on the disk, the same command resumes the run."""
    failure = interrupted.full_disk
    assert failure.status == 2, failure.errors
    # orbax prints log lines as well
    errors = [line for line in failure.errors.splitlines() if "train.py: error:" in line]
    assert len(errors) == 1, failure.errors
    assert "a checkpoint cannot be written in" in errors[0]
    assert "File too large" in errors[0]
    assert not failure.saved


@pytest.mark.slow
def test_a_trace_of_some_steps_is_written(finished: tuple[Path, str], interrupted: Interrupted):
    """Tracing does not change the weights."""
    assert list((finished[0] / "profile").rglob("*.xplane.pb"))
    assert not (interrupted.workdir / "profile").exists()
    for a, b in zip(final_state(interrupted.workdir), final_state(finished[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_finished_run_trains_no_further(finished: tuple[Path, str]):
    workdir, _ = finished
    before, state = records(workdir), final_state(workdir)
    output = small_run(workdir, "--config.tensorboard").stdout
    assert "all 12 steps are done" in output
    assert records(workdir) == before
    for a, b in zip(final_state(workdir), state, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_directory_of_another_run_is_refused_and_left_alone(finished: tuple[Path, str]):
    workdir, _ = finished
    files = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = run("--workdir", str(workdir), *SMALL, "--config.seed=1")
    assert_one_clear_line(result, "belongs to a run with other settings: seed (0 there, 1 here)")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == files


@pytest.mark.slow
def test_weights_that_are_not_finite_stop_the_run_and_are_written_down(tmp_path: Path):
    flags = ("--config.optimizer.learning_rate=1e20", "--config.checkpoint.every_steps=1")
    result = run("--workdir", str(tmp_path), *SMALL, *flags)
    assert result.returncode == 2, result.stderr
    assert "parameter norm is inf at step 1;" in result.stderr
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found["step"] == 1
    assert len(set(found["examples"])) == len(found["examples"]) == 120
    assert found["last_good_checkpoint"] == str(tmp_path / "checkpoints" / "1")
    assert f"the last good checkpoint is {found['last_good_checkpoint']}" in result.stderr
    assert Path(found["last_good_checkpoint"]).is_dir()


@pytest.mark.slow
def test_a_test_loss_that_is_not_finite_stops_the_run(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    config = load_config(str(ROOT / "configs" / "digits.py"))
    for flag in SMALL:
        key, _, value = flag.removeprefix("--config.").partition("=")
        is_text = key == "data.train_split"
        config.update_from_flattened_dict({key: value if is_text else ast.literal_eval(value)})
    config.tensorboard, config.profile = True, 2
    test = Trainer.test

    def diverged(*arguments: Any) -> Any:
        record, sums = test(*arguments)
        return {**record, "ema_test_loss": math.nan}, sums

    monkeypatch.setattr(Trainer, "test", diverged)
    with pytest.raises(UserError, match=r"^the ema test loss is nan at step 11; .*checkpoints/9;"):
        loop.train(config, workdir, Console(quiet=True))


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, f"exit status {result.returncode}: {result.stderr}"
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in ("train.py: error: ", *parts):
        assert part in result.stderr


def test_help_shows_an_example_and_the_flags():
    result = run("--help", "--config=configs/active_tiny.py")
    assert result.returncode == 0
    assert "python train.py --config configs/digits.py" in result.stdout
    assert "--config.KEY=VALUE changes a key" in result.stdout
    assert "directory of the run" in result.stdout
    assert "Keys of configs/active_tiny.py" in result.stdout
    config = load_config(str(ROOT / "configs" / "active_tiny.py"))
    for key in flatten(config):
        key = key.rpartition(".")[2]
        assert re.search(rf"\b{key}=", result.stdout), f"{key} is not listed"
    assert f"depths={config.model.depths}" in result.stdout, "with the values of that file"


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (None, "interrupted; nothing is saved yet"),
        ("tmp", "interrupted; nothing is saved yet"),
        ("12", "interrupted; the same command goes on from there in"),
    ],
)
def test_an_interruption_says_whether_anything_is_saved(
    saved: str | None, expected: str, tmp_path: Path
):
    if saved:
        (tmp_path / "checkpoints" / saved).mkdir(parents=True)
    assert cli_flags._interrupted("", tmp_path).startswith(expected)
    assert cli_flags._interrupted("stopped after step 12", tmp_path).startswith(
        "stopped after step"
    )


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_says_that_nothing_is_saved(tmp_path: Path):
    process = start("--workdir", str(tmp_path / "run"), *SMALL)
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if "parameters" in line:  # the next thing that the run does is compile
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=240)
    assert read[0] == f"starting: config digits, workdir {tmp_path / 'run'}\n"
    assert process.returncode == 130, errors
    assert "interrupted; nothing is saved yet, and the same command starts from the first" in output
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.epoch=3"], ["no key config.epoch", "did you mean config.epochs?"]),
        (["--config.model.depth=3"], ["no key config.model.depth", "config.model.depths"]),
        (
            ["--config.data.flip=0.0"],
            ["no key config.data.flip; did you mean config.augment.flip?"],
        ),
        (["--config.epochs=many"], ["config.epochs=many", "int"]),
        (["--config.ema_decay=high"], ["config.ema_decay=high", "float"]),
        (["--config.model.depths=(2,2,2)"], ["depths is (2, 2, 2), expected four values"]),
        (["--config.model.depths=(2,1,2,2)"], ["stage 1 has 1 block, expected at least 2"]),
        (["--config.model.depths=deep"], ["depths is ('deep',), expected four values"]),
        (
            ["--config.model.embed_dims=(8,16,16,16)", "--config.model.share_dims=(2,3,4,8)"],
            ["16 channels of stage 1", "share_dims value 3"],
        ),
        (["--config.optimizer.b2=1.5"], ["config.optimizer.b2 is 1.5, expected less than 1"]),
        (["--workdir=gs://bucket/run"], ["gs://bucket/run, expected a directory of this machine"]),
        (["--config.data.image_size=16"], ["config.data.image_size is 16, expected at least 32"]),
        (["--config.data.name=cifar"], ["no data set 'cifar', expected digits, folder:PATH, tfds"]),
        (["--config.data.test_split=val"], ["digits has the splits train, test, not 'val'"]),
        (["--config.init_from=nowhere"], ["nowhere is not a model directory: there is no such"]),
        (["--config.batch_size=2000"], ["batch_size is 2000", "only 1437 images"]),
        (["--config=configs/nothing.py"], ["there is no config file configs/nothing.py"]),
        (["--config", "configs/nothing.py"], ["there is no config file configs/nothing.py"]),
        (["--config=README.md"], ["README.md"]),
        (
            ["--config=configs/digits.py:small"],
            ["configs/digits.py:small: get_config() of", "no var"],
        ),
        (
            ["--config=configs/ade20k_fpn.py:tiny"],
            ["fpn.py:tiny: no model 'tiny', expected one of a"],
        ),
        (["--steps=3"], ["Unknown command line flag 'steps'"]),
        (["configs/digits.py"], ["unexpected argument 'configs/digits.py'"]),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(
    arguments: list[str], parts: list[str], tmp_path: Path
):
    workdir = tmp_path / "run"
    assert_one_clear_line(run("--workdir", str(workdir), *arguments), *parts)
    assert not workdir.exists(), "nothing is made for a run that cannot start"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("config = default_config()\n    config.learning_rate = 1e-3", ["learning_rate"]),
        ("config = default_config()\n    config['learning_rate'] = 1e-3", ["learning_rate"]),
        ("config = None", ["get_config() must return default_config() with other values"]),
        ("config = ConfigDict()", ["get_config() must return default_config() with other values"]),
    ],
)
def test_a_config_file_that_gives_no_config_is_one_clear_line(
    body: str, parts: list[str], tmp_path: Path
):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "from activemlp_jax.training.config import default_config\n"
        f"def get_config():\n    {body}\n    return config\n"
    )
    result = run("--config", str(path), "--workdir", str(tmp_path / "run"))
    assert_one_clear_line(result, "mine.py", *parts)


def test_a_workdir_that_cannot_be_written_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("content")
    result = run("--workdir", str(tmp_path / "file"), *SMALL)
    assert_one_clear_line(result, "file cannot be written")

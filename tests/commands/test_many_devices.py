"""Runs on many devices and hosts: same numbers, same samples, and no process left waiting."""

import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import kills
import numpy as np
import pytest
from processes import end, finish, free_address, lines, saved_state, start, start_two

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("devices")

STEPS = 6
# A model that trains in seconds, with some weights large enough to be split. The 360 test images,
# the smallest split, make three steps per epoch.
ARGUMENTS = (
    "--config.model.depths=(2,2,2,2)",
    "--config.model.embed_dims=(8,16,32,64)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    "--config.data.train_split=test",
    "--config.batch_size=120",
    "--config.eval_batch_size=120",
    "--config.epochs=2",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=3",
    # Random erasing, and mixing groups of 8 rows. Of the fifteen groups of a batch, one lies on
    # two hosts, and two on two devices of one host.
    "--config.augment.random_erasing=0.5",
    "--config.augment.mixup_alpha=0.8",
    "--config.augment.cutmix_alpha=1.0",
    "--config.augment.mix_group_size=8",
    # The learning rate is constant.
    "--config.optimizer.learning_rate=1e-3",
    "--config.optimizer.final_learning_rate=1e-3",
    "--config.optimizer.warmup_epochs=0",
)
# In float64, rounding errors are so small that any other difference shows.
FLOAT64 = "--config.model.dtype=float64"
BOUND = 1e-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


def on_one_host(workdir: Path, devices: int = 1) -> list[subprocess.Popen[str]]:
    """Start or resume a run in one process, each of whose devices holds the whole state."""
    return [start("--workdir", str(workdir), *ARGUMENTS, FLOAT64, devices=devices, x64=True)]


def on_two_hosts(workdir: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start a run in two processes with two devices each, which divide the state."""
    flags = (*ARGUMENTS, FLOAT64, "--config.mesh.fsdp=2", *arguments)
    return start_two("--workdir", str(workdir), *flags, devices=2, x64=True)


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Run on one device, and return the workdir."""
    finish(on_one_host(folder / "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Do the same run on two hosts, and return the workdir."""
    finish(on_two_hosts(folder / "two"))
    return folder / "two"


def losses(workdir: Path, first: int = 0) -> np.ndarray:
    found = [line["loss"] for line in lines(workdir / "steps.jsonl") if line["step"] > first]
    assert len(found) == STEPS - first
    return np.array(found)


def difference(ours: object, expected: object) -> float:
    """Compute the norm of the difference divided by the norm of `expected`, over all arrays."""
    a, b = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (ours, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
def test_two_hosts_with_two_devices_each_train_and_test_as_one_device(one: Path, two: Path):
    assert difference(losses(two), losses(one)) <= BOUND
    a, b = saved_state(two, STEPS), saved_state(one, STEPS)
    for key in ("variables", "ema", "opt_state"):
        assert difference(a[key], b[key]) <= BOUND, key
    ours, expected = (lines(path / "metrics.jsonl")[-1] for path in (two, one))
    for key in expected:
        if key.endswith("accuracy"):
            assert ours[key] == expected[key]
        elif key.endswith("loss"):
            assert ours[key] == pytest.approx(expected[key], rel=BOUND), key


@pytest.mark.slow
def test_weights_are_split_over_devices_where_the_mesh_says_so(one: Path, two: Path):
    for workdir, is_split in ((one, False), (two, True)):
        places = workdir / "checkpoints" / str(STEPS) / "state" / "_sharding"
        found = [json.loads(place) for place in json.loads(places.read_text()).values()]
        specs = [place.get("partition_spec", []) for place in found]
        assert any("fsdp" in spec for spec in specs) == is_split, workdir


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_after_a_host_is_killed_within_a_step(folder: Path, two: Path):
    """`python tests/helpers/kills.py` is a longer version of this test, with unsplit states."""

    def start(workdir: Path) -> list[subprocess.Popen[str]]:
        return on_two_hosts(workdir, "--config.checkpoint.every_steps=1", "--timeout=60")

    death = kills.Kill(kills.WAITING, signal.SIGKILL, (1,))
    kills.kill_repeatedly(start, folder / "killed", [death], random.Random(0))
    kills.compare(folder / "killed", two, STEPS)


@pytest.mark.slow
def test_what_two_hosts_saved_goes_on_on_two_devices_of_one_with_the_same_samples(
    tmp_path: Path, one: Path, two: Path
):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    output, *_ = finish(on_one_host(workdir, devices=2))
    assert "going on from step 3 of 6" in output
    for expected in (one, two):
        assert difference(losses(workdir, first=3), losses(expected, first=3)) <= BOUND


def test_a_host_with_other_settings_is_named_and_none_waits_for_it(tmp_path: Path):
    hosts = start_two("--workdir", str(tmp_path / "run"), *ARGUMENTS, second=["--config.seed=1"])
    for process, (_, errors) in zip(hosts, end(hosts), strict=True):
        assert process.returncode == 2, errors
        assert "host 1 differs from host 0: config.seed is 1 there and 0 on host 0" in errors
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_host_ends_the_other_with_its_message(tmp_path: Path):
    hosts = start_two(
        "--workdir", str(tmp_path / "run"), *ARGUMENTS, second=["--config.data.name=cifar"]
    )
    for process, (_, errors) in zip(hosts, end(hosts), strict=True):
        assert process.returncode == 2, errors
        assert "no data set 'cifar', expected digits" in errors


@pytest.mark.parametrize(
    ("number", "status", "reason"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_host_that_is_stopped_before_the_first_step_ends_the_other(
    number: signal.Signals, status: int, reason: str, tmp_path: Path
):
    first, second = start_two("--workdir", str(tmp_path / "run"), *ARGUMENTS)
    while not (tmp_path / "run" / "config.json").exists():
        assert first.poll() is None, first.communicate()
    second.send_signal(number)
    (_, errors), (_, own_errors) = end((first, second))
    assert (first.returncode, second.returncode) == (2, status), errors + own_errors
    assert re.search(rf"error: host 1 \(.*, pid {second.pid}\) stopped: {reason}$", errors, re.M)
    assert f"train.py: error: {reason}" in own_errors
    assert "Traceback" not in own_errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes=2", "--process_id=0"], "two processes have process id 0: host 0 ("),
        (["--num_processes=3", "--process_id=1"], ") was started as one of 3 processes, and host"),
    ],
    ids=["the same number", "another number of processes"],
)
def test_hosts_that_disagree_about_their_numbers_are_named(
    options: list[str], message: str, tmp_path: Path
):
    given = ("--workdir", str(tmp_path / "run"), f"--coordinator={free_address()}")
    hosts = [start(*given, "--num_processes=2", "--process_id=0"), start(*given, *options)]
    for process, (_, errors) in zip(hosts, end(hosts), strict=True):
        assert process.returncode == 2, errors
        assert len(errors.strip().splitlines()) == 1, errors
        assert message in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "1 of 2 hosts have not reached 127.0.0.1"), (1, "host 1 has not met all 2 hosts at")],
)
def test_a_host_whose_others_never_come_says_so(number: int, message: str, tmp_path: Path):
    hosts = (f"--coordinator={free_address()}", "--num_processes=2", f"--process_id={number}")
    process = start("--workdir", str(tmp_path / "run"), *hosts, "--timeout=3")
    ((_, errors),) = end([process])
    assert process.returncode == 2, errors
    assert f"error: after 3 s {message}" in errors
    assert len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=127.0.0.1:80"], "the number of processes and the process id go together"),
        (["--num_processes=2"], "the number of processes and the process id go together"),
        (["--num_processes=2", "--process_id=2"], "process id is 2, expected 0 to 1"),
        (
            ["--num_processes=2", "--process_id=1"],
            "the first of 2 processes is not known",
        ),
        (
            ["--coordinator=here", "--num_processes=2", "--process_id=1"],
            "the coordinator is here, expected HOST:PORT",
        ),
        (
            ["--coordinator=here:99999", "--num_processes=2", "--process_id=1"],
            "the coordinator is here:99999, expected HOST:PORT, PORT 1 to 65535",
        ),
        (
            [f"--num_processes={10**12}", "--process_id=1"],
            "the number of processes is 1000000000000, expected 1 to 1,000,000",
        ),
        (["--config.mesh.fsdp=3"], "config.mesh is all x 3 (data x fsdp), which the 4 devices"),
        (["--config.mesh.data=2"], "config.mesh is 2 x 1 (data x fsdp), which the 4 devices"),
        (
            ["--config.batch_size=30", "--config.augment.mix_group_size=10"],
            "config.batch_size is 30, expected a multiple of 4",
        ),
        (
            ["--config.accumulation=7"],
            "config.batch_size is 120, expected a multiple of 28: there are 4 devices, taken in 7",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path
):
    process = start("--workdir", str(tmp_path / "run"), *ARGUMENTS, *arguments, devices=4)
    ((_, errors),) = end([process])
    assert process.returncode == 2, errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert message in errors
    assert not (tmp_path / "run").exists()

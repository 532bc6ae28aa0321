"""Kill a run of two processes again and again; it must end like an uninterrupted run.

    python tests/helpers/kills.py --kills 20 [--seed 0] [--folder DIR]

Each kill sends SIGKILL or SIGTERM to one process or both, at a random time during startup, steps or
a save, or while one process waits for the other within a step. A surviving process must name the
killed one and exit by itself within seconds. All worker processes must exit too, and their shared
memory must be freed. Every checkpoint must be readable. At the end, no partly written files may be
left, and the whole state is compared bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jax
import numpy as np
import processes

# A model that trains in seconds. It saves every other step, so that many kills hit a save.
STEPS = 60
ARGUMENTS = (
    "--config.model.embed_dims=(8,8,16,16)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    "--config.batch_size=140",
    "--config.epochs=6",
    "--config.eval_batch_size=360",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=2",
    "--config.data.num_workers=2",
)
STARTING, STEPPING, SAVING, WAITING = "starting", "stepping", "saving", "waiting"
TIMEOUT = 60  # seconds that a process waits at startup for one that was killed
MAX_EXIT_SECONDS = 150.0  # limit for any process of a run to exit after a kill
EXIT_SECONDS = 10.0  # limit for a process that knows that another was killed, and for workers
MARK = "ACTIVEMLP_KILLS"  # environment variable of all processes of a run and their children


class Kill(NamedTuple):
    """A signal to one process or both, and when to send it."""

    moment: str
    number: signal.Signals
    victims: tuple[int, ...]


def draw_kill(rng: random.Random) -> Kill:
    return Kill(
        rng.choice((STARTING, STEPPING, STEPPING, SAVING, SAVING, WAITING)),
        rng.choice((signal.SIGKILL, signal.SIGTERM)),
        rng.choice(((0,), (1,), (0, 1))),
    )


Start = Callable[[Path], list[subprocess.Popen[str]]]  # starts the processes of a run in a workdir


def start(workdir: Path) -> list[subprocess.Popen[str]]:
    return processes.start_two("--workdir", str(workdir), f"--timeout={TIMEOUT}", *ARGUMENTS)


def steps_done(workdir: Path) -> int:
    path = workdir / "steps.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def wait_for(moment: str, workdir: Path, rng: random.Random, alive: subprocess.Popen[str]) -> None:
    if moment == STARTING:
        time.sleep(rng.uniform(0.5, 8))
        return
    before = steps_done(workdir)
    while alive.poll() is None and steps_done(workdir) <= before:
        time.sleep(0.01)
    if moment == STEPPING:
        time.sleep(rng.uniform(0, 1.5))
    while moment == SAVING and alive.poll() is None and not is_saving(workdir):
        time.sleep(0.0005)
    if moment == WAITING:
        alive.send_signal(signal.SIGSTOP)
        time.sleep(3)  # by then the other has begun a step and waits for this one


def marked_processes() -> list[Path]:
    """List the /proc folders of the processes that were started with the current `MARK`."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    folders = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark in (folder / "environ").read_bytes().split(b"\0")
            # This process set the mark after its start, so its own `environ` does not have it.
            if is_marked and "\nState:\tZ" not in (folder / "status").read_text():
                folders.append(folder)
        except OSError:  # the process has exited, or belongs to another user
            continue
    return folders


def shared_memory(folders: Sequence[Path]) -> set[Path]:
    """Return files in /dev/shm that the processes with these /proc folders have mapped or open."""
    names = set()
    for folder in folders:
        try:
            lines = (folder / "maps").read_text().splitlines()
            names |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
            names |= {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:
            continue
    return {Path(name) for name in names if name.startswith("/dev/shm/")}


def check_nothing_runs(memory: set[Path]) -> None:
    """Check that within `EXIT_SECONDS` all processes exit and their shared memory is freed."""
    deadline = time.monotonic() + EXIT_SECONDS
    while (running := marked_processes()) or any(path.exists() for path in memory):
        if time.monotonic() > deadline:
            commands = [(path / "cmdline").read_bytes().replace(b"\0", b" ") for path in running]
            segments = sorted(path.name for path in memory if path.exists())
            raise AssertionError(f"after {EXIT_SECONDS:.0f} s {commands} and {segments} are left")
        time.sleep(0.1)


def check_nothing_half_written(workdir: Path) -> None:
    patterns = ("*.partial", "*.previous", "*.orbax-checkpoint-tmp*")
    partial = [path for pattern in patterns for path in workdir.rglob(pattern)]
    assert not partial, partial


def check_survivor(process: subprocess.Popen[str], errors: str, victim: int, pid: int) -> None:
    """Check that the last error line names the killed process; XLA may print warnings before."""
    assert process.returncode == 2, errors
    assert "Traceback" not in errors, errors
    assert "stack trace" not in errors, errors
    *_, line = errors.strip().splitlines()
    assert f"error: host {victim} (" in line, errors
    assert f", pid {pid}) is gone" in line, errors


def check_readable(workdir: Path) -> int:
    """Read every checkpoint whole; return the newest saved step, 0 if there is none."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    for step in steps:
        leaves = jax.tree.leaves(processes.saved_state(workdir, step))
        assert len(leaves) > 300, f"the checkpoint of step {step} has {len(leaves)} arrays"
        assert all(np.isfinite(leaf).all() for leaf in leaves), f"step {step} is not finite"
    return max(steps, default=0)


def kill_once(start: Start, workdir: Path, kill: Kill, rng: random.Random) -> str:
    """Start a run, kill it and check that all its processes exit; return a description."""
    os.environ[MARK] = str(uuid4())
    run = start(workdir)
    try:
        wait_for(kill.moment, workdir, rng, run[kill.victims[0]])
        memory = shared_memory(marked_processes())
        for victim in kill.victims:
            assert run[victim].poll() is None, f"process {victim} ended before {kill}"
            run[victim].send_signal(kill.number)
            # A stopped process handles SIGTERM only after it continues.
            run[victim].send_signal(signal.SIGCONT)
        began = time.monotonic()
        errors = [process.communicate(timeout=MAX_EXIT_SECONDS)[1] for process in run]
        seconds = time.monotonic() - began
        statuses = [process.returncode for process in run]
        if kill.number == signal.SIGKILL and len(kill.victims) == 1 and kill.moment != STARTING:
            (victim,) = kill.victims
            check_survivor(run[1 - victim], errors[1 - victim], victim, run[victim].pid)
            assert seconds < EXIT_SECONDS, f"{seconds:.1f} s"
        check_nothing_runs(memory)
        done = f"{kill.number.name} of {kill.victims} while {kill.moment}"
        segments = f"{len(memory)} segments of shared memory"
        return f"{done}: ended with {statuses} after {seconds:.1f} s; {segments}"
    finally:
        for process in run:
            process.kill()
            process.wait()


def kill_repeatedly(start: Start, workdir: Path, kills: Sequence[Kill], rng: random.Random) -> None:
    """Kill a run repeatedly, check what it saved each time, and finally let it finish."""
    for count, kill in enumerate(kills, 1):
        done = kill_once(start, workdir, kill, rng)
        print(f"{count}: {done}; saved up to step {check_readable(workdir)}", flush=True)
    processes.finish(start(workdir))
    check_nothing_runs(set())
    check_nothing_half_written(workdir)


def stable_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a record file without values that depend on time or the machine."""
    lines = processes.lines(path)
    for line in lines:
        for key in ("images_per_second", "memory_gib"):
            line.pop(key, None)
    return lines


def compare(ours: Path, expected: Path, step: int) -> int:
    """Check that two runs have equal records and bitwise equal states; return the array count."""
    a, b = (jax.tree.leaves(processes.saved_state(path, step)) for path in (ours, expected))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert stable_lines(ours / name) == stable_lines(expected / name), f"{name} differs"
    return len(a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the two runs (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        before = set(Path("/dev/shm").iterdir())
        uninterrupted, killed = folder / "uninterrupted", folder / "killed"
        processes.finish(start(uninterrupted))
        rng = random.Random(arguments.seed)
        kills = [draw_kill(rng) for _ in range(arguments.kills)]
        kill_repeatedly(start, killed, kills, rng)
        left = set(Path("/dev/shm").iterdir()) - before
        assert not left, f"shared memory is left: {left}"
        arrays = compare(killed, uninterrupted, STEPS)
        print(f"{arrays} arrays are equal bit for bit after {len(kills)} kills")


if __name__ == "__main__":
    main()

"""Kill a run of two processes again and again; it must end as one that nobody touched.

    python tests/helpers/kills.py --kills 20 [--seed 0] [--folder DIR]

Each kill is SIGKILL or SIGTERM, of one process or of both, at a random moment of the start, of the
steps, of a save, or while one process waits for the other within a step. A process that is left
has to name the one that was killed and to end by itself, within seconds, as do all worker
processes, and their shared memory goes with them. Every checkpoint that is there has to be
readable. In the end nothing half written is left, and the whole state is compared bit for bit.
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

# A model that trains in seconds; a save every other step, so that many kills hit one.
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
TIMEOUT = 60  # seconds for which a process waits at the start for one that was killed
PATIENCE = 150.0  # seconds for those who were not killed to end
SOON = 10.0  # seconds for those to end who know that another was killed, and for worker processes
MARK = "ACTIVEMLP_KILLS"  # in the environment of all processes of a run and their children


class Kill(NamedTuple):
    """A signal for one process or for both, at some moment."""

    moment: str
    number: signal.Signals
    victims: tuple[int, ...]


def draw_kill(chance: random.Random) -> Kill:
    return Kill(
        chance.choice((STARTING, STEPPING, STEPPING, SAVING, SAVING, WAITING)),
        chance.choice((signal.SIGKILL, signal.SIGTERM)),
        chance.choice(((0,), (1,), (0, 1))),
    )


Start = Callable[[Path], list[subprocess.Popen[str]]]  # the processes of a run in a workdir


def start(workdir: Path) -> list[subprocess.Popen[str]]:
    return processes.start_two("--workdir", str(workdir), f"--timeout={TIMEOUT}", *ARGUMENTS)


def steps_done(workdir: Path) -> int:
    path = workdir / "steps.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def wait_for(
    moment: str, workdir: Path, chance: random.Random, alive: subprocess.Popen[str]
) -> None:
    if moment == STARTING:
        time.sleep(chance.uniform(0.5, 8))
        return
    before = steps_done(workdir)
    while alive.poll() is None and steps_done(workdir) <= before:
        time.sleep(0.01)
    if moment == STEPPING:
        time.sleep(chance.uniform(0, 1.5))
    while moment == SAVING and alive.poll() is None and not is_saving(workdir):
        time.sleep(0.0005)
    if moment == WAITING:
        alive.send_signal(signal.SIGSTOP)
        time.sleep(3)  # the other has begun a step by then, and waits for this one's share


def marked_processes() -> list[Path]:
    """The processes started with this process's `MARK`, by their folder in /proc."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark in (folder / "environ").read_bytes().split(b"\0")
            # The mark is set in this process after its start, so it is not among them.
            if is_marked and "\nState:\tZ" not in (folder / "status").read_text():
                found.append(folder)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def shared_memory(found: Sequence[Path]) -> set[Path]:
    """The files in /dev/shm that processes have mapped or open."""
    names = set()
    for folder in found:
        try:
            lines = (folder / "maps").read_text().splitlines()
            names |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
            names |= {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:
            continue
    return {Path(name) for name in names if name.startswith("/dev/shm/")}


def check_nothing_runs(memory: set[Path]) -> None:
    """See that all processes and their shared memory are gone, or soon are."""
    deadline = time.monotonic() + SOON
    while (left := marked_processes()) or any(path.exists() for path in memory):
        if time.monotonic() > deadline:
            commands = [(path / "cmdline").read_bytes().replace(b"\0", b" ") for path in left]
            segments = sorted(path.name for path in memory if path.exists())
            raise AssertionError(f"after {SOON:.0f} s there are {commands} and {segments}")
        time.sleep(0.1)


def check_nothing_half_written(workdir: Path) -> None:
    patterns = ("*.partial", "*.previous", "*.orbax-checkpoint-tmp*")
    found = [path for pattern in patterns for path in workdir.rglob(pattern)]
    assert not found, found


def check_survivor(process: subprocess.Popen[str], errors: str, victim: int, pid: int) -> None:
    """See that a process ended with one line that names another which was killed.

    Lines before it may come from XLA, which warns where it takes long to compile.
    """
    assert process.returncode == 2, errors
    assert "Traceback" not in errors, errors
    assert "stack trace" not in errors, errors
    *_, line = errors.strip().splitlines()
    assert f"error: host {victim} (" in line, errors
    assert f", pid {pid}) is gone" in line, errors


def check_readable(workdir: Path) -> int:
    """The newest step that was saved; every checkpoint is read whole."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    for step in steps:
        leaves = jax.tree.leaves(processes.saved_state(workdir, step))
        assert len(leaves) > 300, f"the checkpoint of step {step} has {len(leaves)} arrays"
        assert all(np.isfinite(leaf).all() for leaf in leaves), f"step {step} is not finite"
    return max(steps, default=0)


def kill_once(start: Start, workdir: Path, kill: Kill, chance: random.Random) -> str:
    """Start the run, kill it, see all of it end; what was done, in words."""
    os.environ[MARK] = str(uuid4())
    run = start(workdir)
    try:
        wait_for(kill.moment, workdir, chance, run[kill.victims[0]])
        memory = shared_memory(marked_processes())
        for victim in kill.victims:
            assert run[victim].poll() is None, f"process {victim} ended before {kill}"
            run[victim].send_signal(kill.number)
            run[victim].send_signal(signal.SIGCONT)  # SIGTERM waits as long as it is stopped
        began = time.monotonic()
        errors = [process.communicate(timeout=PATIENCE)[1] for process in run]
        seconds = time.monotonic() - began
        statuses = [process.returncode for process in run]
        if kill.number == signal.SIGKILL and len(kill.victims) == 1 and kill.moment != STARTING:
            (victim,) = kill.victims
            check_survivor(run[1 - victim], errors[1 - victim], victim, run[victim].pid)
            assert seconds < SOON, f"{seconds:.1f} s"
        check_nothing_runs(memory)
        done = f"{kill.number.name} of {kill.victims} while {kill.moment}"
        segments = f"{len(memory)} segments of shared memory"
        return f"{done}: ended with {statuses} after {seconds:.1f} s; {segments}"
    finally:
        for process in run:
            process.kill()
            process.wait()


def torment(start: Start, workdir: Path, kills: Sequence[Kill], chance: random.Random) -> None:
    """Kill a run again and again, look at what it saved each time, and let it end."""
    for count, kill in enumerate(kills, 1):
        done = kill_once(start, workdir, kill, chance)
        print(f"{count}: {done}; saved up to step {check_readable(workdir)}", flush=True)
    processes.finish(start(workdir))
    check_nothing_runs(set())
    check_nothing_half_written(workdir)


def figures(path: Path) -> list[dict[str, Any]]:
    """The lines of a record, without what a clock or the machine says."""
    lines = processes.lines(path)
    for line in lines:
        for key in ("images_per_second", "memory_gib"):
            line.pop(key, None)
    return lines


def compare(ours: Path, expected: Path, step: int) -> int:
    """See that two runs have the same record and, bit for bit, the same state; arrays of it."""
    a, b = (jax.tree.leaves(processes.saved_state(path, step)) for path in (ours, expected))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert figures(ours / name) == figures(expected / name), f"{name} differs"
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
        untouched, killed = folder / "untouched", folder / "killed"
        processes.finish(start(untouched))
        chance = random.Random(arguments.seed)
        kills = [draw_kill(chance) for _ in range(arguments.kills)]
        torment(start, killed, kills, chance)
        left = set(Path("/dev/shm").iterdir()) - before
        assert not left, f"shared memory is left: {left}"
        arrays = compare(killed, untouched, STEPS)
        print(f"{arrays} arrays are equal bit for bit after {len(kills)} kills")


if __name__ == "__main__":
    main()

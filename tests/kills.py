"""Kill a run of two processes again and again; it must end as one that nobody touched.

    python tests/kills.py --kills 20 [--seed 0] [--folder DIR]

Each kill is SIGKILL or SIGTERM, of one process or of both, at a random moment of the start, of the
steps, or of a save. What is left of the processes has to end by itself; every checkpoint that is
there has to be readable. In the end the whole state is compared bit for bit.
"""

import argparse
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
)
STARTING, STEPPING, SAVING = "starting", "stepping", "saving"
TIMEOUT = 60  # seconds for which a process waits at the start for one that was killed
PATIENCE = 150.0  # seconds for those who were not killed to end


class Kill(NamedTuple):
    """A signal for one process or for both, at some moment."""

    moment: str
    number: signal.Signals
    victims: tuple[int, ...]


def draw_kill(chance: random.Random) -> Kill:
    return Kill(
        chance.choice((STARTING, STEPPING, STEPPING, SAVING, SAVING)),
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
    run = start(workdir)
    try:
        wait_for(kill.moment, workdir, chance, run[kill.victims[0]])
        for victim in kill.victims:
            assert run[victim].poll() is None, f"process {victim} ended before {kill}"
            run[victim].send_signal(kill.number)
        began = time.monotonic()
        for process in run:
            process.communicate(timeout=PATIENCE)
        statuses = [process.returncode for process in run]
        done = f"{kill.number.name} of {kill.victims} while {kill.moment}"
        return f"{done}: ended with {statuses} after {time.monotonic() - began:.1f} s"
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
        untouched, killed = folder / "untouched", folder / "killed"
        processes.finish(start(untouched))
        chance = random.Random(arguments.seed)
        kills = [draw_kill(chance) for _ in range(arguments.kills)]
        torment(start, killed, kills, chance)
        arrays = compare(killed, untouched, STEPS)
        print(f"{arrays} arrays are equal bit for bit after {len(kills)} kills")


if __name__ == "__main__":
    main()

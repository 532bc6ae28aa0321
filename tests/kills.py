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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import processes

# A model that trains in seconds; a save every other step, so that many kills hit one.
STEPS = 60
ARGUMENTS = (
    "--config.model.embed_dims=(8,8,16,16)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    "--config.batch_size=140",
    "--config.eval_batch_size=360",
    "--config.epochs=6",
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


def start(workdir: Path) -> list[subprocess.Popen[str]]:
    return processes.start_two("--workdir", str(workdir), *ARGUMENTS, f"--timeout={TIMEOUT}")


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


def kill_once(workdir: Path, kill: Kill, chance: random.Random) -> str:
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


def compare(ours: Path, expected: Path) -> int:
    """The number of arrays of the final state, all equal bit for bit."""
    a, b = (jax.tree.leaves(processes.saved_state(path, STEPS)) for path in (ours, expected))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    return len(a)


def torment(folder: Path, kills: Sequence[Kill], chance: random.Random) -> None:
    """The whole test: an untouched run, kills, the last resume, the comparison."""
    untouched, killed = folder / "untouched", folder / "killed"
    processes.finish(start(untouched))
    for count, kill in enumerate(kills, 1):
        done = kill_once(killed, kill, chance)
        print(f"{count}: {done}; saved up to step {check_readable(killed)}", flush=True)
    processes.finish(start(killed))
    print(f"{compare(killed, untouched)} arrays are equal bit for bit after {len(kills)} kills")
    for name in ("metrics.jsonl", "steps.jsonl"):
        ours, expected = (
            [
                {
                    key: value
                    for key, value in line.items()
                    if key not in ("images_per_second", "memory_gib")
                }
                for line in processes.lines(path / name)
            ]
            for path in (killed, untouched)
        )
        assert ours == expected, f"{name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the two runs (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        chance = random.Random(arguments.seed)
        kills = [draw_kill(chance) for _ in range(arguments.kills)]
        torment(arguments.folder or Path(temporary), kills, chance)


if __name__ == "__main__":
    main()

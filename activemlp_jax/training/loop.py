"""The training loop: build, restore; step after step; evaluate and save; sum up."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from activemlp_jax.data.loader import Skipped, sample_order, train_batches
from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.base import Sums
from activemlp_jax.training.checkpoints import Checkpoints, Restored
from activemlp_jax.training.failures import non_finite, stop_at_non_finite
from activemlp_jax.training.init_from import initial_variables
from activemlp_jax.training.interruption import Interruption
from activemlp_jax.training.profiling import Trace
from activemlp_jax.training.reporting import (
    Reporter,
    Tracker,
    Work,
    describe_length,
    lagging_average,
)
from activemlp_jax.training.results import draw_pictures, write_model_directory
from activemlp_jax.training.run import Run, check_shared, prepare_run
from activemlp_jax.training.step import Metrics, TrainState
from activemlp_jax.training.trainer import train_flops
from activemlp_jax.training.workdir import (
    EPOCHS,
    STEPS,
    claim_workdir,
    read_records,
    rewind_records,
)
from activemlp_jax.utils.errors import Interrupted
from activemlp_jax.utils.hardware import peak_flops
from activemlp_jax.utils.types import Record


def train(
    config: ConfigDict,
    workdir: Path,
    console: Console,
    *,
    config_name: str = "",
    trackers: Sequence[Tracker] = (),
    timeout: float = 300,
) -> None:
    """Train as `config` says, or go on where the run in `workdir` stopped.

    Args:
      config: of `default_config`'s form.
      workdir: made if need be, and shared by all hosts; the module `workdir` says what it holds.
      console: where to report; only the first host does, but for images that another skips.
      config_name: what model directories call the config, such as 'digits'; '' for nothing.
      trackers: called with every record; see `Reporter`.
      timeout: seconds that the hosts wait for each other before the first step.

    Raises:
      UserError: settings that cannot work, a workdir that cannot be used or has lost its
        checkpoints, a checkpoint that cannot be read or written, or a loss that is not finite.
      Interrupted: the run was asked to stop, and has saved its state.
    """
    run = prepare_run(config, workdir, timeout, config_name)
    speaks = sharding.is_first_host()
    say_here = _speaker(console)
    console = console if speaks else Console(quiet=True)
    say = _speaker(console)
    with contextlib.ExitStack() as stack:
        if speaks:
            stack.enter_context(claim_workdir(workdir, run.config))
        check_shared(workdir, timeout)
        # Read the records now, so that a broken line is reported before training, not after it.
        records = [read_records(workdir / name) for name in (EPOCHS, STEPS) if speaks]
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", run.config))
        restored = checkpoints.restore(run.trainer.state)
        if restored is None:
            if speaks:
                checkpoints.begin(has_records=any(records))
            variables = initial_variables(run.config, run.trainer.task, say)
            variables = sharding.put_everywhere(variables, run.mesh)
            restored = Restored(run.trainer.first_state(variables), [])
        first_step = int(restored.state.step)
        if speaks:
            for name in (EPOCHS, STEPS):
                rewind_records(workdir / name, first_step)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(restored.state.variables["params"]))
        say(sharding.describe(run.mesh))
        say(
            f"{parameters:,} parameters, {len(run.train_source):,} images to train, "
            f"{len(run.test_source):,} to test, in {workdir}"
        )
        say(describe_length(run.config, run.trainer.steps_per_epoch, run.last_step))
        if first_step == run.last_step:
            say(f"all {run.last_step} steps are done; give another --workdir to train again")
        elif first_step:
            say(f"going on from step {first_step} of {run.last_step}")

        flops = train_flops(run.config, run.trainer.model)
        peak = peak_flops(run.mesh.devices.flat[0].device_kind, run.mesh.size)
        epochs, batch_size = run.trainer.epochs, run.config.batch_size
        work = Work(first_step, run.last_step, epochs, batch_size, flops, peak)
        with Reporter(workdir if speaks else None, work, run.config, console, trackers) as reporter:
            last = _take_steps(run, restored, checkpoints, reporter, say, say_here)

        checkpoints.wait()
        found = run.trainer.score(last.sums)
        write_model_directory(run, "model", last.state, found)
        best = checkpoints.best()
        if best is not None and best.step != run.last_step:
            again = checkpoints.restore(run.trainer.state, best.step)
            assert again is not None, f"{best} is there"
            write_model_directory(run, "best_model", again.state, best.score)
            say(f"best_model is of step {best.step}, with {best.score:.2f}%")
        names = draw_pictures(run, last.state, last.sums)
    task, images = run.trainer.task, len(run.test_source)
    if lag := lagging_average(run.config, last.record, task.score, images):
        say(lag)
    *others, final = ["model", *names]
    say(
        f"{task.score_name} {found:.2f}% on {images:,} test images, {last.seconds:.0f} s of "
        f"training; see {', '.join(others)} and {final} in {workdir}"
    )


class _Last(NamedTuple):
    """The state after the last step, its test, and the seconds that training took."""

    state: TrainState
    record: Record
    sums: Sums
    seconds: float


def _speaker(console: Console) -> Callable[[str], None]:
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def _take_steps(
    run: Run,
    restored: Restored,
    checkpoints: Checkpoints,
    reporter: Reporter,
    say: Callable[[str], None],
    say_here: Callable[[str], None],
) -> _Last:
    """Take the steps from the restored one to the last."""
    config, epoch_steps = run.config, run.trainer.steps_per_epoch
    state, losses = restored
    first_step = int(state.step)
    started = time.perf_counter()
    if first_step < run.last_step:
        say("compiling, which can take minutes for a large model")
    if first_step == run.last_step or config.test.every_epochs == 1:
        found, sums = run.trainer.test(
            state, run.test_source
        )  # compiles it, and is all that a finished run needs
    if first_step == run.last_step:
        return _Last(state, found, sums, 0.0)
    train_step = run.trainer.train_step.lower(run.trainer.state, run.trainer.batch).compile()
    say(f"compiled in {time.perf_counter() - started:.0f} s")

    skipped = Skipped(config.data.max_skipped, say_here, sharding.shared_store())
    batches = train_batches(
        run.train_source,
        run.trainer.task.transform,
        config,
        first_step=first_step,
        last_step=run.last_step,
        skipped=skipped,
        **sharding.this_host(),
    )
    handed_out: deque[tuple[int, Metrics]] = deque()

    def check_finite(step: int, figures: Record) -> None:
        broken = non_finite(figures)
        if broken:
            batch = sample_order(config, len(run.train_source)).batch(step)
            # Weights that gave a loss that is none are not good, though saved before it.
            good = checkpoints.newest(below=step if "loss" in broken else step + 1)
            raise stop_at_non_finite(run.workdir, step, figures, batch, good)

    def settle(most: int) -> None:
        """Wait until at most `most` steps are still running on the devices."""
        while len(handed_out) > most:
            step, metrics = handed_out.popleft()
            figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(step, figures)
            trace.after(step)
            losses.append(figures["loss"])
            reporter.step(step + 1, figures)

    started = time.perf_counter()
    with (
        contextlib.closing(sharding.prefetch(batches, run.mesh)) as placed_batches,
        Trace(run.workdir / "profile", first_step, run.last_step, config.profile) as trace,
        Interruption(say) as interruption,
    ):
        for epoch in range(first_step // epoch_steps + 1, run.trainer.epochs + 1):
            start, end = (epoch - 1) * epoch_steps, min(epoch * epoch_steps, run.last_step)
            reporter.start_epoch(epoch, start)
            for step in range(max(first_step, start), end):
                trace.before(step)
                state, metrics = train_step(state, next(placed_batches))
                handed_out.append((step, metrics))
                settle(most=1)  # not 0: while the host waits the device should not

                reached, done = None, step + 1
                if done == end:
                    settle(most=0)
                    found = {}
                    if epoch % config.test.every_epochs == 0 or done == run.last_step:
                        found, sums = run.trainer.test(state, run.test_source)
                        check_finite(step, {key: found[key] for key in found if "loss" in key})
                        reached = run.trainer.score(sums)
                    reporter.epoch(
                        {
                            "epoch": epoch,
                            "step": done,
                            "learning_rate": float(metrics["learning_rate"]),
                            "train_loss": float(np.mean(losses)),
                            "images_per_second": round(reporter.images_per_second(), 1),
                            "images_skipped": sharding.sum_over_hosts(len(skipped)),
                            **found,
                        }
                    )
                    losses.clear()

                checkpoints.check()
                stop = interruption.asked(done) and done < run.last_step
                by_epoch = done == end and epoch % config.checkpoint.every_epochs == 0
                if stop or by_epoch or checkpoints.is_due(done) or done == run.last_step:
                    settle(most=0)
                    checkpoints.save(state, done, losses, reached)
                if stop:
                    checkpoints.wait()
                    raise Interrupted(f"stopped after step {done}", interruption.status)
    return _Last(state, found, sums, time.perf_counter() - started)

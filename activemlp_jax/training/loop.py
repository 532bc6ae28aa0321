"""The training loop: build or restore the state, train, evaluate, save, and write the results."""

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
from activemlp_jax.distributed import hosts, sharding
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
    EPOCHS_FILE,
    STEPS_FILE,
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
) -> None:
    """Train a model as `config` says, or resume the run in `workdir`.

    Args:
      config: the whole config, with the keys of `default_config`.
      workdir: directory of the run, shared by all hosts and created if needed; the module
        `workdir` lists what it holds.
      console: where to print. Only the first host prints, except that every host reports the
        images it skips.
      config_name: name of the config to record in model directories, such as 'digits'; '' for none.
      trackers: functions to call with every record; see `Reporter`.

    Raises:
      UserError: invalid settings, a workdir that cannot be used or has lost its checkpoints, a
        checkpoint that cannot be read or written, or a loss, gradient or weight that is not finite.
      Interrupted: the run was asked to stop, and has saved its state.
    """
    run = prepare_run(config, workdir, config_name)
    is_first_host = hosts.is_first()
    log_on_this_host = _logger(console)
    console = console if is_first_host else Console(quiet=True)
    log = _logger(console)
    with contextlib.ExitStack() as stack:
        if is_first_host:
            stack.enter_context(claim_workdir(workdir, run.config))
        check_shared(workdir)
        # Read the records now, so that a damaged file stops the run before training, not after.
        records = [
            read_records(workdir / name) for name in (EPOCHS_FILE, STEPS_FILE) if is_first_host
        ]
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", run.config))
        restored = checkpoints.restore(run.trainer.state)
        if restored is None:
            if is_first_host:
                checkpoints.begin(has_records=any(records))
            variables = initial_variables(run.config, run.trainer.task, log)
            variables = sharding.put_everywhere(variables, run.mesh)
            restored = Restored(run.trainer.first_state(variables), [])
        first_step = int(restored.state.step)
        if is_first_host:
            for name in (EPOCHS_FILE, STEPS_FILE):
                rewind_records(workdir / name, first_step)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(restored.state.variables["params"]))
        log(sharding.describe(run.mesh))
        log(
            f"{parameters:,} parameters, {len(run.train_source):,} images to train, "
            f"{len(run.test_source):,} to test, in {workdir}"
        )
        log(describe_length(run.config, run.trainer.steps_per_epoch, run.last_step))
        if first_step == run.last_step:
            log(f"all {run.last_step} steps are done; give another --workdir to train again")
        elif first_step:
            log(f"going on from step {first_step} of {run.last_step}")

        flops = train_flops(run.config, run.trainer.model)
        peak = peak_flops(run.mesh.devices.flat[0].device_kind, run.mesh.size)
        epochs, batch_size = run.trainer.epochs, run.config.batch_size
        work = Work(first_step, run.last_step, epochs, batch_size, flops, peak)
        reporter_workdir = workdir if is_first_host else None
        with Reporter(reporter_workdir, work, run.config, console, trackers) as reporter:
            result = _run_steps(run, restored, checkpoints, reporter, log, log_on_this_host)

        checkpoints.wait()
        score = run.trainer.score(result.sums)
        write_model_directory(run, "model", result.state, score)
        best = checkpoints.best()
        if best is not None and best.step != run.last_step:
            restored_best = checkpoints.restore(run.trainer.state, best.step)
            assert restored_best is not None, f"{best} exists"
            write_model_directory(run, "best_model", restored_best.state, best.score)
            log(f"best_model is from step {best.step}, with {best.score:.2f}%")
        names = draw_pictures(run, result.state, result.sums)
    task, images = run.trainer.task, len(run.test_source)
    if lag := lagging_average(run.config, result.metrics, task.score, images):
        log(lag)
    *others, final = ["model", *names]
    log(
        f"{task.score_name} {score:.2f}% on {images:,} test images, {result.seconds:.0f} s of "
        f"training; see {', '.join(others)} and {final} in {workdir}"
    )


class _Result(NamedTuple):
    """The final state, its test metrics and sums, and the seconds that training took."""

    state: TrainState
    metrics: Record
    sums: Sums
    seconds: float


def _logger(console: Console) -> Callable[[str], None]:
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def _run_steps(
    run: Run,
    restored: Restored,
    checkpoints: Checkpoints,
    reporter: Reporter,
    log: Callable[[str], None],
    log_on_this_host: Callable[[str], None],
) -> _Result:
    """Train from the restored step to the last step."""
    config, epoch_steps = run.config, run.trainer.steps_per_epoch
    state, losses = restored
    first_step = int(state.step)
    started = time.perf_counter()
    if first_step < run.last_step:
        log("compiling, which can take minutes for a large model")
    if first_step == run.last_step or config.test.every_epochs == 1:
        # This compiles the evaluation; a finished run needs nothing else.
        test_metrics, sums = run.trainer.test(state, run.test_source)
    if first_step == run.last_step:
        return _Result(state, test_metrics, sums, 0.0)
    train_step = run.trainer.train_step.lower(run.trainer.state, run.trainer.batch).compile()
    log(f"compiled in {time.perf_counter() - started:.0f} s")

    skipped = Skipped(config.data.max_skipped, log_on_this_host, hosts.shared_store())
    batches = train_batches(
        run.train_source,
        run.trainer.task.transform,
        config,
        first_step=first_step,
        last_step=run.last_step,
        skipped=skipped,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    pending: deque[tuple[int, Metrics]] = deque()  # dispatched steps

    def check_finite(step: int, metrics: Record) -> None:
        broken = non_finite(metrics)
        if broken:
            batch = sample_order(config, len(run.train_source)).batch(step)
            # A loss comes from the weights before the update, so checkpoint `step` is bad as well.
            last_good = checkpoints.newest(below=step if "loss" in broken else step + 1)
            raise stop_at_non_finite(run.workdir, step, metrics, batch, last_good)

    def wait_for_steps(max_pending: int) -> None:
        """Wait for the oldest dispatched steps and report them, until `max_pending` are left."""
        while len(pending) > max_pending:
            step, device_metrics = pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            check_finite(step, metrics)
            trace.after(step)
            losses.append(metrics["loss"])
            reporter.step(step + 1, metrics)

    started = time.perf_counter()
    with (
        contextlib.closing(sharding.prefetch(batches, run.mesh)) as placed_batches,
        Trace(run.workdir / "profile", first_step, run.last_step, config.profile) as trace,
        Interruption(log) as interruption,
    ):
        for epoch in range(first_step // epoch_steps + 1, run.trainer.epochs + 1):
            start, end = (epoch - 1) * epoch_steps, min(epoch * epoch_steps, run.last_step)
            reporter.start_epoch(epoch, start)
            for step in range(max(first_step, start), end):
                trace.before(step)
                state, metrics = train_step(state, next(placed_batches))
                pending.append((step, metrics))
                wait_for_steps(max_pending=1)  # 0 would leave the devices idle between steps

                score, steps_done = None, step + 1
                if steps_done == end:
                    wait_for_steps(max_pending=0)
                    test_metrics = {}
                    if epoch % config.test.every_epochs == 0 or steps_done == run.last_step:
                        test_metrics, sums = run.trainer.test(state, run.test_source)
                        check_finite(
                            step, {key: test_metrics[key] for key in test_metrics if "loss" in key}
                        )
                        score = run.trainer.score(sums)
                    reporter.epoch(
                        {
                            "epoch": epoch,
                            "step": steps_done,
                            "learning_rate": float(metrics["learning_rate"]),
                            "train_loss": float(np.mean(losses)),
                            "images_per_second": round(reporter.images_per_second(), 1),
                            "images_skipped": hosts.sum_over_hosts(len(skipped)),
                            **test_metrics,
                        }
                    )
                    losses.clear()

                checkpoints.check()
                is_last = steps_done == run.last_step
                stop = interruption.requested(steps_done) and not is_last
                by_epoch = steps_done == end and epoch % config.checkpoint.every_epochs == 0
                if stop or by_epoch or checkpoints.is_due(steps_done) or is_last:
                    wait_for_steps(max_pending=0)
                    checkpoints.save(state, steps_done, losses, score)
                if stop:
                    checkpoints.wait()
                    raise Interrupted(f"stopped after step {steps_done}", interruption.status)
    return _Result(state, test_metrics, sums, time.perf_counter() - started)

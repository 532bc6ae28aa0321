"""The training loop: build or restore the state, train, evaluate, save, and write the results."""

import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from activemlp_jax.data.loader import Skipped, sample_order, train_batches
from activemlp_jax.distributed import hosts, sharding
from activemlp_jax.tasks.base import Sums
from activemlp_jax.training.checkpoints import Checkpoints, Restored
from activemlp_jax.training.init_from import initial_variables
from activemlp_jax.training.reporting import (
    Reporter,
    Trace,
    Tracker,
    Work,
    describe_length,
    lagging_average,
)
from activemlp_jax.training.results import draw_pictures, write_model_directory
from activemlp_jax.training.step import Metrics, TrainState
from activemlp_jax.training.stopping import Interruption, non_finite, stop_at_non_finite
from activemlp_jax.training.trainer import Run, prepare_run
from activemlp_jax.training.workdir import (
    EPOCHS_FILE,
    STEPS_FILE,
    claim_workdir,
    read_records,
    replace_file,
    rewind_records,
)
from activemlp_jax.utils.errors import Interrupted
from activemlp_jax.utils.hardware import peak_flops
from activemlp_jax.utils.types import Record

log = logging.getLogger(__name__)


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
      workdir: directory of the run, shared by all hosts and created if needed.
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
    config, trainer, is_first = run.config, run.trainer, hosts.is_first()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_logging_to(console))
        if is_first:
            stack.enter_context(claim_workdir(workdir, config))
        _check_shared(workdir)
        # Read the records now, so that a damaged file stops the run before training, not after.
        records = [read_records(workdir / name) for name in (EPOCHS_FILE, STEPS_FILE) if is_first]
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config))
        restored = checkpoints.restore(trainer.state)
        if restored is None:
            if is_first:
                checkpoints.begin(has_records=any(records))
            variables = initial_variables(config, trainer.task)
            state = trainer.first_state(sharding.put_everywhere(variables, trainer.mesh))
            restored = Restored(state, [])
        first_step = int(restored.state.step)
        if is_first:
            for name in (EPOCHS_FILE, STEPS_FILE):
                rewind_records(workdir / name, first_step)
        _log_start(run, restored.state)

        work = Work(
            first_step,
            trainer.steps,
            trainer.epochs,
            config.batch_size,
            trainer.step_flops,
            peak_flops(trainer.mesh.devices.flat[0].device_kind, trainer.mesh.size),
        )
        with Reporter(workdir if is_first else None, work, config, console, trackers) as reporter:
            state, metrics, sums, seconds = _run_steps(run, restored, checkpoints, reporter)

        checkpoints.wait()
        score = trainer.score(sums)
        write_model_directory(run, "model", state, score)
        best = checkpoints.best()
        if best is not None and best.step != trainer.steps:
            restored_best = checkpoints.restore(trainer.state, best.step)
            assert restored_best is not None, f"{best} exists"
            write_model_directory(run, "best_model", restored_best.state, best.score)
            log.info(f"best_model is from step {best.step}, with {best.score:.2f}%")
        names = ["model", *draw_pictures(run, state, sums)]
        images = len(run.test_source)
        if lag := lagging_average(config, metrics, trainer.task.score, images):
            log.info(lag)
        log.info(
            f"{trainer.task.score_name} {score:.2f}% on {images:,} test images, {seconds:.0f} s of "
            f"training; see {', '.join(names[:-1])} and {names[-1]} in {workdir}"
        )


@contextlib.contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    """Print this package's log messages; hosts other than the first print only warnings."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)

    logger, handler = logging.getLogger("activemlp_jax"), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if hosts.is_first() else logging.WARNING)
    logger.propagate = False  # absl prints everything that reaches the root logger
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _check_shared(workdir: Path) -> None:
    """Raise UserError unless `workdir` is the same directory on all hosts."""
    if jax.process_count() == 1:
        return
    mark = workdir / ".mark"
    if hosts.is_first():
        replace_file(mark, uuid.uuid4().hex)
    hosts.check_same("the workdir", {})  # wait until the mark is written
    name = f"the mark in {workdir}, which must be a directory that all hosts share,"
    hosts.check_same("the mark", {name: mark.read_text() if mark.exists() else None})


def _log_start(run: Run, state: TrainState) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.variables["params"]))
    first_step, steps = int(state.step), run.trainer.steps
    log.info(sharding.describe(run.trainer.mesh))
    log.info(
        f"{parameters:,} parameters, {len(run.train_source):,} images to train, "
        f"{len(run.test_source):,} to test, in {run.workdir}"
    )
    log.info(describe_length(run.config, run.trainer.steps_per_epoch, steps))
    if first_step == steps:
        log.info(f"all {steps} steps are done; give another --workdir to train again")
    elif first_step:
        log.info(f"going on from step {first_step} of {steps}")


def _run_steps(
    run: Run, restored: Restored, checkpoints: Checkpoints, reporter: Reporter
) -> tuple[TrainState, Record, Sums, float]:
    """Train to the last step; return the state, its test metrics and sums, and the time taken."""
    config, trainer, (state, losses) = run.config, run.trainer, restored
    epoch_steps, last_step = trainer.steps_per_epoch, trainer.steps
    first_step = int(state.step)
    started = time.perf_counter()
    if first_step < last_step:
        log.info("compiling, which can take minutes for a large model")
    if first_step == last_step or config.test.every_epochs == 1:
        # If every epoch is tested, test once before the first step, so that the evaluation is
        # compiled before training starts. A finished run needs only this test.
        test_metrics, sums = trainer.test(state, run.test_source)
    if first_step == last_step:
        return state, test_metrics, sums, 0.0
    train_step = trainer.train_step.lower(trainer.state, trainer.batch).compile()
    log.info(f"compiled in {time.perf_counter() - started:.0f} s")

    skipped = Skipped(config.data.max_skipped, log.warning, hosts.shared_store())
    batches = train_batches(
        run.train_source,
        trainer.task.transform,
        config,
        first_step=first_step,
        last_step=last_step,
        skipped=skipped,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    pending: deque[tuple[int, Metrics]] = deque()  # steps that are not reported yet

    def check_finite(step: int, metrics: Record) -> None:
        broken = non_finite(metrics)
        if broken:
            batch = sample_order(config, len(run.train_source)).batch(step)
            # The loss is computed before the update, with the weights that checkpoint `step` has,
            # so that checkpoint is bad as well.
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
        contextlib.closing(sharding.prefetch(batches, trainer.mesh)) as placed_batches,
        Trace(run.workdir / "profile", first_step, last_step, config.profile) as trace,
        Interruption() as interruption,
    ):
        for step in range(first_step, last_step):
            epoch, steps_done = step // epoch_steps + 1, step + 1
            if step == first_step or step % epoch_steps == 0:
                reporter.start_epoch(epoch, step - step % epoch_steps)
            trace.before(step)
            state, metrics = train_step(state, next(placed_batches))
            pending.append((step, metrics))
            wait_for_steps(max_pending=1)  # 0 would leave the devices idle between steps

            score, is_last = None, steps_done == last_step
            ends_epoch = is_last or steps_done % epoch_steps == 0
            if ends_epoch:
                wait_for_steps(max_pending=0)
                test_metrics = {}
                if is_last or epoch % config.test.every_epochs == 0:
                    test_metrics, sums = trainer.test(state, run.test_source)
                    test_losses = {key: test_metrics[key] for key in test_metrics if "loss" in key}
                    check_finite(step, test_losses)
                    score = trainer.score(sums)
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
            stop = interruption.requested(steps_done) and not is_last
            by_epoch = ends_epoch and epoch % config.checkpoint.every_epochs == 0
            if stop or by_epoch or checkpoints.is_due(steps_done) or is_last:
                wait_for_steps(max_pending=0)
                checkpoints.save(state, steps_done, losses, score)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"stopped after step {steps_done}", interruption.status)
    return state, test_metrics, sums, time.perf_counter() - started

"""The training loop: build, restore; step after step; evaluate and save; sum up."""

import contextlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from activemlp_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from activemlp_jax.data.sources import Source, open_source
from activemlp_jax.errors import UserError
from activemlp_jax.training import sharding
from activemlp_jax.training.checkpoints import Checkpoints
from activemlp_jax.training.config import build_model, check_config
from activemlp_jax.training.optimizer import adamw, cosine_schedule
from activemlp_jax.training.pictures import draw_confusion, draw_curves
from activemlp_jax.training.reporting import Reporter
from activemlp_jax.training.step import Batch, Params, TrainState, make_train_step
from activemlp_jax.training.tasks import Classification
from activemlp_jax.training.workdir import Record, claim_workdir, rewind_records

Count = Callable[[Params, Batch], dict[str, jax.Array]]
Sums = dict[str, np.ndarray]


def evaluate(count: Count, params: Params, source: Source, config: ConfigDict, mesh: Mesh) -> Sums:
    """The task's `count` summed over `source`, every example once."""
    sums: Sums = {}
    with contextlib.closing(eval_batches(source, config, **sharding.this_host())) as batches:
        for batch in batches:
            counted = jax.device_get(count(params, sharding.put_batch(batch, mesh)))
            sums = {key: sums.get(key, 0) + value for key, value in counted.items()}
    return sums


def example_batch(source: Source, config: ConfigDict, mesh: Mesh) -> Batch:
    """A batch like all those of a run."""
    batches = train_batches(source, config, first_step=0, last_step=1, **sharding.this_host())
    with contextlib.closing(batches):
        return sharding.put_batch(next(batches), mesh)


def train(config: ConfigDict, workdir: Path, console: Console) -> None:
    """Train as `config` says, or go on where the run in `workdir` stopped.

    Args:
      config: of `default_config`'s form.
      workdir: made if need be; the module `workdir` says what it holds.
      console: where to report.

    Raises:
      UserError: settings that cannot work, a workdir that cannot be used, or a loss that is not
        finite.
    """
    check_config(config)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for key in ("batch_size", "eval_batch_size"):
        sharding.check_batch_size(key, config[key])
    train_source = open_source(config.data.name, "train")
    test_source = open_source(config.data.name, "test")
    epoch_steps = steps_per_epoch(train_source, config.batch_size)
    last_step = config.epochs * epoch_steps
    claim_workdir(workdir, config)

    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    model = build_model(config, num_classes=len(train_source.class_names))
    task = Classification(model, config.label_smoothing, config.data.mean, config.data.std)
    schedule = cosine_schedule(config.optimizer, epoch_steps, config.epochs)
    optimizer = adamw(config.optimizer, schedule)
    train_step: Any = jax.jit(
        make_train_step(task.loss, optimizer, config.ema_decay, config.seed),
        donate_argnums=0,
        out_shardings=everywhere,
    )
    count = jax.jit(task.count, out_shardings=everywhere)

    def initial_state() -> TrainState:
        images = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
        variables = model.init(jax.random.key(config.seed), images)
        return TrainState.create(variables["params"], optimizer, config.ema_decay)

    def test(state: TrainState) -> tuple[Record, Sums]:
        """Metrics of the weights and of their average, and the sums of the last of these."""
        sums = evaluate(count, state.params, test_source, config, mesh)
        record = {f"test_{key}": value for key, value in task.metrics(sums).items()}
        if state.ema_params is not None:
            sums = evaluate(count, state.ema_params, test_source, config, mesh)
            record |= {f"ema_test_{key}": value for key, value in task.metrics(sums).items()}
        return record, sums

    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        state = checkpoints.restore_latest(jax.eval_shape(initial_state), everywhere)
        if state is None:
            state = jax.jit(initial_state, out_shardings=everywhere)()
        first_step = int(state.step)
        records = rewind_records(workdir, first_step)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        say(
            f"{parameters:,} parameters on {jax.device_count()} {jax.default_backend()} device(s), "
            f"{len(train_source):,} images to train, {len(test_source):,} to test, in {workdir}"
        )
        if first_step == last_step:
            say(f"all {last_step} steps are done; give another --workdir to train again")
        elif first_step:
            say(f"going on from step {first_step} of {last_step}")

        started = time.perf_counter()
        _, sums = test(state)  # compiles the evaluation, and is all that a finished run needs
        if first_step < last_step:
            batch = example_batch(train_source, config, mesh)
            train_step = train_step.lower(state, batch).compile()
            say(f"compiled in {time.perf_counter() - started:.0f} s")

        batches = train_batches(
            train_source, config, first_step=first_step, last_step=last_step, **sharding.this_host()
        )
        reporter = Reporter(
            workdir, first_step, last_step, config.batch_size, config.tensorboard, console
        )
        started = time.perf_counter()
        with reporter, contextlib.closing(batches):
            for epoch in range(first_step // epoch_steps + 1, config.epochs + 1):
                reporter.start_epoch(epoch, config.epochs)
                losses: list[jax.Array] = []
                for step in range((epoch - 1) * epoch_steps, epoch * epoch_steps):
                    state, loss = train_step(state, sharding.put_batch(next(batches), mesh))
                    losses.append(loss)
                    # Waiting for the step before, not for this one, keeps the device busy.
                    reporter.step(check_finite(losses[-2:][0], step))
                train_loss = np.mean([check_finite(loss, step) for loss in losses])
                metrics, sums = test(state)
                record = {
                    "epoch": epoch,
                    "step": step + 1,
                    "learning_rate": float(schedule(step)),
                    "train_loss": float(train_loss),
                    "images_per_second": round(reporter.images_per_second(), 1),
                    **metrics,
                }
                for key in ("test_loss", "ema_test_loss"):
                    check_finite(record.get(key, 0.0), step, key)
                reporter.epoch(record)
                records.append(record)
                if epoch % config.checkpoint.every_epochs == 0 or epoch == config.epochs:
                    checkpoints.save(state)

        seconds = time.perf_counter() - started

    accuracy = task.metrics(sums)["accuracy"]
    if records:  # a finished run whose metrics.jsonl was taken away has none
        draw_curves(records, workdir / "curves.png")
    draw_confusion(
        sums["confusion"], train_source.class_names, accuracy, workdir / "confusion_matrix.png"
    )
    say(
        f"accuracy {accuracy:.2f}% on {len(test_source):,} test images, "
        f"{seconds:.0f} s of training; see curves.png and confusion_matrix.png in {workdir}"
    )


def check_finite(loss: jax.Array | float, step: int, name: str = "loss") -> float:
    """`loss` as a number; raises UserError if it is none."""
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(f"the {name} is {value} at or just before step {step}; the run stops here")
    return value

"""The training loop: build, restore; step after step; evaluate and save; sum up."""

import contextlib
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from activemlp_jax.data.examples import check_same_classes
from activemlp_jax.data.pipeline import Skipped, eval_batches, sample_order, train_batches
from activemlp_jax.data.sources import open_source
from activemlp_jax.errors import UserError
from activemlp_jax.training import sharding
from activemlp_jax.training.checkpoints import Checkpoints
from activemlp_jax.training.config import build_model, build_preprocessing, check_config
from activemlp_jax.training.evaluation import Sums, evaluate
from activemlp_jax.training.optimizer import make_optimizer
from activemlp_jax.training.pictures import draw_confusion, draw_curves
from activemlp_jax.training.pretrained import (
    adopt_architecture,
    draw_params,
    initial_params,
    write_result,
)
from activemlp_jax.training.reporting import Reporter
from activemlp_jax.training.schedules import learning_rate_schedule
from activemlp_jax.training.step import Params, TrainState, make_train_step
from activemlp_jax.training.tasks import Classification
from activemlp_jax.training.workdir import Record, claim_workdir, rewind_records


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
    config = adopt_architecture(config)
    check_config(config)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for key in ("batch_size", "eval_batch_size"):
        sharding.check_batch_size(key, config[key])
    train_source = open_source(config.data.name, config.data.train_split)
    test_source = open_source(config.data.name, config.data.test_split)
    class_names = train_source.class_names
    check_same_classes(class_names, test_source.class_names, f"the test set of {config.data.name}")
    epoch_steps = sample_order(config, len(train_source)).steps_per_epoch
    last_step = config.epochs * epoch_steps
    claim_workdir(workdir, config)

    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    model = build_model(config, num_classes=len(class_names))
    preprocessing = build_preprocessing(config)
    task = Classification(model, config.data.mean, config.data.std, config)
    schedule = learning_rate_schedule(
        config.optimizer, epoch_steps, config.epochs, config.batch_size
    )
    optimizer = make_optimizer(config.optimizer, schedule, model)
    train_step: Any = jax.jit(
        make_train_step(task.loss, optimizer, config.ema_decay, config.seed),
        donate_argnums=0,
        out_shardings=everywhere,
    )
    count = jax.jit(task.count, out_shardings=everywhere)

    def first_state(params: Params) -> TrainState:
        return TrainState.create(params, optimizer, config.ema_decay)

    def test(state: TrainState) -> tuple[Record, Sums]:
        """Metrics of the weights and of their average, and the sums of the last of these."""
        weights = {"test": state.params}
        if state.ema_params is not None:
            weights["ema_test"] = state.ema_params
        batches = eval_batches(
            test_source,
            preprocessing,
            config.eval_batch_size,
            num_threads=config.data.num_threads,
            **sharding.this_host(),
        )
        with contextlib.closing(batches):
            sums = evaluate(count, weights, batches, mesh)
        record = {
            f"{name}_{key}": value
            for name in weights
            for key, value in task.metrics(sums[name]).items()
        }
        return record, sums[list(weights)[-1]]

    with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
        shapes = jax.eval_shape(lambda: first_state(draw_params(config, model)))
        state = checkpoints.restore_latest(shapes, everywhere)
        if state is None:
            params = initial_params(config, model, say)
            state = jax.jit(first_state, out_shardings=everywhere)(params)
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
            shapes = sharding.batch_shapes(config.batch_size, config.data.image_size, mesh)
            train_step = train_step.lower(state, shapes).compile()
            say(f"compiled in {time.perf_counter() - started:.0f} s")

        skipped = Skipped(config.data.max_skipped, say)
        batches = train_batches(
            train_source,
            config,
            first_step=first_step,
            last_step=last_step,
            skipped=skipped,
            **sharding.this_host(),
        )
        batches = sharding.prefetch(batches, mesh)
        reporter = Reporter(
            workdir, first_step, last_step, config.batch_size, config.tensorboard, console
        )
        started = time.perf_counter()
        with reporter, contextlib.closing(batches):
            for epoch in range(first_step // epoch_steps + 1, config.epochs + 1):
                reporter.start_epoch(epoch, config.epochs)
                losses: list[jax.Array] = []
                for step in range((epoch - 1) * epoch_steps, epoch * epoch_steps):
                    state, loss = train_step(state, next(batches))
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
                    "images_skipped": len(skipped),
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
    draw_confusion(sums["confusion"], class_names, accuracy, workdir / "confusion_matrix.png")
    source = {"trained_on": config.data.name, "epoch": config.epochs, "test_accuracy": accuracy}
    write_result(workdir / "model", config, model, state, class_names, source)
    say(
        f"accuracy {accuracy:.2f}% on {len(test_source):,} test images, "
        f"{seconds:.0f} s of training; see model, curves.png and confusion_matrix.png in {workdir}"
    )


def check_finite(loss: jax.Array | float, step: int, name: str = "loss") -> float:
    """`loss` as a number; raises UserError if it is none."""
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(f"the {name} is {value} at or just before step {step}; the run stops here")
    return value

"""A run as a whole: what it is made of, how it is tested, and what it leaves at the end."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.examples import Source, check_same_classes
from activemlp_jax.data.pipeline import eval_batches
from activemlp_jax.data.sources import open_source
from activemlp_jax.training import sharding
from activemlp_jax.training.config import build_preprocessing, check_config
from activemlp_jax.training.evaluation import Sums, evaluate
from activemlp_jax.training.facts import run_facts
from activemlp_jax.training.pictures import draw_confusion, draw_curves
from activemlp_jax.training.pretrained import adopt_architecture, write_result
from activemlp_jax.training.program import Program, build_program
from activemlp_jax.training.step import Params, TrainState
from activemlp_jax.training.workdir import EPOCHS, Record, read_mark, read_records, write_mark


class Run(NamedTuple):
    """What does not change from the first step of a run to its last."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    train_source: Source
    test_source: Source
    program: Program

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.train_source.class_names

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return self.config.epochs * self.program.steps_per_epoch


def prepare_run(config: ConfigDict, workdir: Path, timeout: float) -> Run:
    """Open the data and build the program; the same on all hosts, which is checked.

    Args:
      config: of `default_config`'s form.
      workdir: of the run; it is not touched.
      timeout: seconds to wait for the other hosts.

    Raises:
      UserError: settings or data that cannot work, or hosts that differ.
    """
    config = adopt_architecture(config)
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train_source = open_source(config.data.name, config.data.train_split)
    test_source = open_source(config.data.name, config.data.test_split)
    names = train_source.class_names
    check_same_classes(names, test_source.class_names, f"the test set of {config.data.name}")
    program = build_program(config, len(names), len(train_source), mesh)
    sharding.check_same("the run", run_facts(config, (train_source, test_source)), timeout)
    return Run(config, workdir, mesh, train_source, test_source, program)


def check_shared(workdir: Path, timeout: float) -> None:
    """Raises UserError if `workdir` is not one and the same directory for all hosts."""
    if sharding.this_host()["processes"] == 1:
        return
    if sharding.is_first_host():
        write_mark(workdir)
    sharding.check_same("the workdir", {}, timeout)  # waits until the mark is there
    name = f"the mark in {workdir}, which must be a directory that all hosts share,"
    sharding.check_same("the mark", {name: read_mark(workdir)}, timeout)


def _weights(state: TrainState) -> dict[str, Params]:
    """By kind, the one that is judged first."""
    return {"model": state.params} | ({} if state.ema_params is None else {"ema": state.ema_params})


def test(run: Run, state: TrainState) -> tuple[Record, Sums]:
    """Metrics of the weights and of their average, and the sums of the last of these."""
    names = {"model": "test", "ema": "ema_test"}
    weights = {names[kind]: params for kind, params in _weights(state).items()}
    batches = eval_batches(
        run.test_source,
        build_preprocessing(run.config),
        run.config.eval_batch_size,
        num_threads=run.config.data.num_threads,
        **sharding.this_host(),
    )
    with contextlib.closing(batches):
        sums = evaluate(run.program.count, weights, batches, run.mesh)
    record = {
        f"{name}_{key}": value
        for name in weights
        for key, value in run.program.task.metrics(sums[name]).items()
    }
    return record, sums[list(weights)[-1]]


def write_model_directory(run: Run, name: str, state: TrainState, accuracy: float) -> None:
    """A state as the model directory `name` in the workdir; all hosts call it, one writes."""
    weights = sharding.fetch(_weights(state), run.mesh)
    if sharding.is_first_host():
        source: dict[str, Any] = {
            "trained_on": run.config.data.name,
            "epoch": int(state.step) // run.program.steps_per_epoch,
            "test_accuracy": accuracy,
        }
        by_preference = {kind: weights[kind] for kind in sorted(weights)}
        write_result(
            run.workdir / name,
            run.config,
            run.program.model,
            by_preference,
            run.class_names,
            source,
        )


def draw_pictures(run: Run, sums: Sums) -> None:
    """The curves of all epochs and the confusion matrix of `sums`."""
    records = read_records(run.workdir / EPOCHS)
    if records:  # a finished run whose metrics.jsonl was taken away has none
        draw_curves(records, run.workdir / "curves.png")
    accuracy = run.program.task.metrics(sums)["accuracy"]
    picture = run.workdir / "confusion_matrix.png"
    draw_confusion(sums["confusion"], run.class_names, accuracy, picture)

"""A run as a whole: what it is made of, how it is tested, and what it leaves at the end."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from activemlp_jax.data.base import Source, check_same_classes
from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.base import Sums
from activemlp_jax.tasks.registry import TASKS, open_data
from activemlp_jax.training.config import check_config
from activemlp_jax.training.consistency import run_facts
from activemlp_jax.training.init_from import adopt_architecture, write_result
from activemlp_jax.training.program import Program, build_program
from activemlp_jax.training.step import TrainState
from activemlp_jax.training.workdir import EPOCHS, read_mark, read_records, write_mark
from activemlp_jax.utils.types import Record, Variables

CURVES, CONFUSION, EXAMPLES = "curves.png", "confusion_matrix.png", "scenes.png"


class Run(NamedTuple):
    """What does not change from the first step of a run to its last."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    train_source: Source
    test_source: Source
    program: Program
    config_name: str  # '' where the config is of no file

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.train_source.class_names

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return self.program.steps


def prepare_run(config: ConfigDict, workdir: Path, timeout: float, config_name: str = "") -> Run:
    """Open the data and build the program; the same on all hosts, which is checked.

    Args:
      config: of `default_config`'s form.
      workdir: of the run; it is not touched.
      timeout: seconds to wait for the other hosts.
      config_name: what model directories call the config, such as 'digits'; '' for nothing.

    Raises:
      UserError: settings or data that cannot work, or hosts that differ.
    """
    config = adopt_architecture(config)
    check_config(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    train_source = open_data(config, config.data.train_split)
    test_source = open_data(config, config.data.test_split)
    names = train_source.class_names
    check_same_classes(names, test_source.class_names, f"the test set of {config.data.name}")
    TASKS[config.task].check_packages(config)  # better missed now than at the first image
    program = build_program(config, len(names), len(train_source), mesh)
    sharding.check_same("the run", run_facts(config, (train_source, test_source)), timeout)
    return Run(config, workdir, mesh, train_source, test_source, program, config_name)


def check_shared(workdir: Path, timeout: float) -> None:
    """Raises UserError if `workdir` is not one and the same directory for all hosts."""
    if sharding.this_host()["processes"] == 1:
        return
    if sharding.is_first_host():
        write_mark(workdir)
    sharding.check_same("the workdir", {}, timeout)  # waits until the mark is there
    name = f"the mark in {workdir}, which must be a directory that all hosts share,"
    sharding.check_same("the mark", {name: read_mark(workdir)}, timeout)


def _weights(state: TrainState) -> dict[str, Variables]:
    """By kind, the one that is judged first."""
    return {"model": state.variables} | ({} if state.ema is None else {"ema": state.ema})


def test(run: Run, state: TrainState) -> tuple[Record, Sums]:
    """Metrics of the weights and of their average, and the sums of the last of these."""
    names = {"model": "test", "ema": "ema_test"}
    weights = {names[kind]: variables for kind, variables in _weights(state).items()}
    sums = run.program.test(weights, run.test_source)
    record = {
        f"{name}_{key}": value
        for name in weights
        for key, value in run.program.task.metrics(sums[name]).items()
    }
    return record, sums[list(weights)[-1]]


def score(run: Run, sums: Sums) -> float:
    """The figure, in percent, by which states are compared."""
    return run.program.task.metrics(sums)[run.program.task.score]


def describe_source(run: Run, step: int, found: float) -> dict[str, Any]:
    """What a model directory says of where its weights come from.

    Args:
      run: of the weights.
      step: of the run that they are of.
      found: the task's score of the test images, in percent.

    Returns:
      As JSON takes it: `trained_on`, the name of the data set, with `train_images` of it; `epoch`
      and `step` that the weights are of; `test_accuracy` or `test_mean_iou` in percent, of so many
      `test_images` of `test_split`; and the recipe, each key where it holds: `config`, its name,
      `epochs` or `steps` of the whole run, and `init_from`.
    """
    config = run.config
    recipe = {
        "config": run.config_name,
        "steps": config.steps,
        "epochs": 0 if config.steps else config.epochs,
        "init_from": config.init_from,
    }
    return {
        "trained_on": config.data.name,
        "epoch": step // run.program.steps_per_epoch,
        "step": step,
        **({f"test_{run.program.task.score}": found} if math.isfinite(found) else {}),
        "train_images": len(run.train_source),
        "test_images": len(run.test_source),
        "test_split": config.data.test_split,
        **{key: value for key, value in recipe.items() if value},
    }


def write_model_directory(run: Run, name: str, state: TrainState, found: float) -> None:
    """A state as the model directory `name` in the workdir; all hosts call it, one writes.

    Args:
      run: that the state is of.
      name: of the directory.
      state: to write the weights and their average of.
      found: its score of the test images, in percent; see `describe_source`.
    """
    weights = sharding.fetch(_weights(state), run.mesh)
    if sharding.is_first_host():
        by_preference = {kind: weights[kind] for kind in sorted(weights)}
        write_result(
            run.workdir / name,
            run.program.task,
            by_preference,
            run.class_names,
            describe_source(run, int(state.step), found),
        )


def draw_pictures(run: Run, state: TrainState, sums: Sums) -> list[str]:
    """The curves of all epochs, the confusion matrix of `sums`, and some scenes where pixels are
    labelled; the names of the files. All hosts call it, one draws.
    """
    task, weights = run.program.task, _weights(state)
    variables = sharding.fetch(weights[list(weights)[-1]], run.mesh)
    if not sharding.is_first_host():
        return []
    from activemlp_jax.plots.training import draw_confusion, draw_curves  # slow to import

    records = read_records(run.workdir / EPOCHS)
    if records:  # a finished run whose metrics.jsonl was taken away has none
        draw_curves(records, task.score, task.score_name, run.workdir / CURVES)
    confusion = sums["confusion"]
    right, total = int(np.trace(confusion)), int(confusion.sum())
    title = f"{right:,} of {total:,} test {task.counted} right ({100 * right / total:.2f}%)"
    draw_confusion(confusion, run.class_names, title, run.workdir / CONFUSION)
    examples = task.draw_examples(variables, run.test_source, run.class_names)
    if examples is not None:
        examples.save(run.workdir / EXAMPLES)
    return [name for name in (CURVES, CONFUSION, EXAMPLES) if (run.workdir / name).exists()]

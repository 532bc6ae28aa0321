"""Results written at the end of a run: model directories and plots."""

import math
import pathlib
from typing import Any

from activemlp_jax.distributed import hosts, sharding
from activemlp_jax.tasks.base import Sums, Task
from activemlp_jax.training.step import TrainState
from activemlp_jax.training.trainer import Run
from activemlp_jax.training.workdir import EPOCHS_FILE, read_records
from activemlp_jax.utils.files import write_directory_aside, writing
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import write_model

CURVES, CONFUSION, EXAMPLES = "curves.png", "confusion_matrix.png", "scenes.png"


def describe_source(run: Run, step: int, score: float) -> dict[str, Any]:
    """Make the `source` of a `ModelCard`, which says how the weights at `step` were trained.

    `score` is the task's score on the test images, in percent. A score that is not finite and
    settings that do not apply are left out.
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
        "epoch": step // run.trainer.steps_per_epoch,
        "step": step,
        **({f"test_{run.trainer.task.score}": score} if math.isfinite(score) else {}),
        "train_images": len(run.train_source),
        "test_images": len(run.test_source),
        "test_split": config.data.test_split,
        **{key: value for key, value in recipe.items() if value},
    }


def write_result(
    directory: pathlib.Path,
    task: Task,
    weights: dict[str, Variables],
    class_names: tuple[str, ...],
    source: dict[str, Any],
) -> None:
    """Write a model directory, replacing an older one; call it on one host only.

    `weights` are numpy arrays by kind; the first kind is the default. `source` says how they were
    trained; see `describe_source`. Raises UserError if the directory cannot be written.
    """
    kinds = tuple(weights)
    card = ModelCard(
        task.model, task.preprocessing, kinds, kinds[0], class_names, source, task.name
    )
    with writing(directory), write_directory_aside(directory) as aside:
        write_model(aside, card, weights)


def write_model_directory(run: Run, name: str, state: TrainState, score: float) -> None:
    """Write a state's weights to the model directory `name` in the workdir; call it on all hosts.

    If the run keeps averaged weights, they become the default. For `score`, see `describe_source`.
    """
    weights = sharding.fetch(state.weights(), run.trainer.mesh)
    if hosts.is_first():
        ema_first = {kind: weights[kind] for kind in sorted(weights)}
        source = describe_source(run, int(state.step), score)
        write_result(run.workdir / name, run.trainer.task, ema_first, run.class_names, source)


def draw_pictures(run: Run, state: TrainState, sums: Sums) -> list[str]:
    """Draw training curves, the confusion matrix and example predictions; call it on all hosts.

    The example predictions use the weights in `state`; the confusion matrix is in `sums`, from the
    last test. Returns the names of the pictures in the workdir; none on hosts other than the first.
    """
    task, weights = run.trainer.task, state.weights()
    variables = sharding.fetch(weights[list(weights)[-1]], run.trainer.mesh)
    if not hosts.is_first():
        return []
    from activemlp_jax.plots.training import draw_curves  # slow to import

    records = read_records(run.workdir / EPOCHS_FILE)
    if records:  # none if metrics.jsonl of a finished run was removed
        draw_curves(records, task.score, task.score_name, run.workdir / CURVES)
    task.draw_sums(sums, run.class_names, run.workdir / CONFUSION)
    examples = task.draw_examples(variables, run.test_source, run.class_names)
    if examples is not None:
        examples.save(run.workdir / EXAMPLES)
    return [name for name in (CURVES, CONFUSION, EXAMPLES) if (run.workdir / name).exists()]

"""What a run leaves at its end: model directories and pictures."""

import math
import pathlib
from typing import Any

import numpy as np

from activemlp_jax.distributed import sharding
from activemlp_jax.tasks.base import Sums, Task
from activemlp_jax.training.run import Run
from activemlp_jax.training.step import TrainState
from activemlp_jax.training.workdir import EPOCHS, read_records
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.model_directory import ModelCard, write_model

CURVES, CONFUSION, EXAMPLES = "curves.png", "confusion_matrix.png", "scenes.png"


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
        "epoch": step // run.trainer.steps_per_epoch,
        "step": step,
        **({f"test_{run.trainer.task.score}": found} if math.isfinite(found) else {}),
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
    """The end of a run as a model directory, in place of an older one; called by one host alone.

    Args:
      directory: to write.
      task: with the model that was trained, and its preprocessing.
      weights: numpy arrays by kind, 'ema' before 'model' where there is an average.
      class_names: by label.
      source: where the weights come from, as JSON takes it.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    kinds = tuple(weights)
    card = ModelCard(
        task.model, task.preprocessing, kinds, kinds[0], class_names, source, task.name
    )
    try:
        with write_directory_aside(directory) as place:
            write_model(place, card, weights)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error


def write_model_directory(run: Run, name: str, state: TrainState, found: float) -> None:
    """A state as the model directory `name` in the workdir; all hosts call it, one writes.

    Args:
      run: that the state is of.
      name: of the directory.
      state: to write the weights and their average of.
      found: its score of the test images, in percent; see `describe_source`.
    """
    weights = sharding.fetch(state.weights(), run.mesh)
    if sharding.is_first_host():
        by_preference = {kind: weights[kind] for kind in sorted(weights)}
        write_result(
            run.workdir / name,
            run.trainer.task,
            by_preference,
            run.class_names,
            describe_source(run, int(state.step), found),
        )


def draw_pictures(run: Run, state: TrainState, sums: Sums) -> list[str]:
    """The curves of all epochs, the confusion matrix of `sums`, and some scenes where pixels are
    labelled; the names of the files. All hosts call it, one draws.
    """
    task, weights = run.trainer.task, state.weights()
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

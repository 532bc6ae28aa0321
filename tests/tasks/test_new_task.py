"""A new task is one class and one line in the registry; this one tells how an image is turned."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run_main
from PIL import Image
from rich.console import Console
from small_models import BACKBONE, CLASSIFIER, PREPROCESSING, save_model

from activemlp_jax import evaluate, predict
from activemlp_jax.data.base import Example, Source
from activemlp_jax.data.sources import open_source
from activemlp_jax.tasks.classification import Classification
from activemlp_jax.tasks.registry import TASKS
from activemlp_jax.training.config import default_config
from activemlp_jax.training.loop import train
from activemlp_jax.weights.model_directory import read_card

ANGLES = ("0", "90", "180", "270")


class Turned:
    """A dataset whose labels are quarter turns."""

    class_names = ANGLES

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        turns = index % 4
        image = np.asarray(self._source[index].image)
        return Example(np.ascontiguousarray(np.rot90(image, turns)), turns)


@dataclasses.dataclass(frozen=True)
class Rotation(Classification):
    """The task of classifying by how much an image is turned."""

    name = "rotation"
    noun = "rotation model"

    @staticmethod
    def open_data(name: str, split: str | None) -> Source:
        return Turned(open_source(name, split))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, Rotation.name, Rotation)


@pytest.mark.slow
def test_it_trains_resumes_evaluates_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = default_config()
    config.task = "rotation"
    config.model.update(BACKBONE | {"mlp_ratios": (2.0,) * 4})
    config.update_from_flattened_dict({"steps": 4, "data.train_split": "test", "batch_size": 90})
    console = Console(width=200)
    train(config, tmp_path / "run", console)
    train(config, tmp_path / "run", console)
    assert "all 4 steps are done" in capsys.readouterr().out

    directory = tmp_path / "run" / "model"
    assert (read_card(directory).task, read_card(directory).class_names) == ("rotation", ANGLES)
    *_, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    options = ("split", "batch_size", "num_threads", "image_size", "size_multiple")
    flags = dict.fromkeys(("multi_scale", "slide"), False)
    arguments = {"directory": str(directory), "data": "digits"}
    *_, line = evaluate.evaluate(arguments | dict.fromkeys(options) | flags)
    record = json.loads(line)
    assert record["ema"]["acc1"] == pytest.approx(last["ema_test_accuracy"], abs=1e-9)

    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    result = run_main(predict.main, directory, tmp_path / "photo.png", "--json")
    classes = json.loads(result.stdout)["classes"]
    assert {found["name"] for found in classes} == set(ANGLES)


def test_a_directory_of_an_unknown_task_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_model(tmp_path / "model", CLASSIFIER, PREPROCESSING, task="rotation")
    monkeypatch.delitem(TASKS, "rotation")
    line = error_line(predict.main, tmp_path / "model", "photo.png")
    assert "model is for the task 'rotation', expected classification, segmentation" in line

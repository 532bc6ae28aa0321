"""Segmentation from end to end: train, test and label photos, in real processes."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from processes import ROOT, finish, lines, start, start_two
from rich.console import Console
from scenes import mask, mocked_records, prepare_scene_parse150, save_ade20k

import activemlp_jax as am
from activemlp_jax import evaluate
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.training.cli_flags import load_config
from activemlp_jax.training.loop import train
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import write_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("segmentation")]

STEPS = 3
DIGITS = (
    *("--config", "configs/digit_scenes.py", f"--config.steps={STEPS}"),
    *("--config.batch_size=4", "--config.log_every_steps=1", "--config.test.every_epochs=9"),
    "--config.model.depths=(2,2,2,2)",
    *("--config.model.embed_dims=(8,16,24,32)", "--config.model.share_dims=(2,4,4,8)"),
    *("--config.head.channels=16", "--config.head.aux_channels=8", "--config.eval_batch_size=50"),
    *("--config.model.drop_path_rate=0.0", "--config.head.dropout_rate=0.0"),
)
# The real recipe with small sizes; the backbone is that of the weights to start from.
SMALL: dict[str, Any] = {
    "batch_size": 2,
    "model.dtype": "float32",  # the dtype of evaluation
    "eval_batch_size": 1,
    "steps": 3,
    "log_every_steps": 1,
    "head.channels": 16,
    "head.aux_channels": 8,
    "data.image_size": 64,
    "data.scene.long_side": 256,
    "data.scene.short_side": 64,
    "data.num_threads": 2,
}


def run(module: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"activemlp_jax.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def form(picture: Path) -> tuple[str, tuple[int, int]]:
    """Return the Pillow mode and the size of an image file."""
    with Image.open(picture) as image:
        return image.mode, image.size


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model directory of a small classifier."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    model = am.ActiveMLP(**{**goldens.MICRO, "depths": (2, 2, 2, 2)})
    card = ModelCard(model, Preprocessing(), ("model",), "model")
    with write_directory_aside(directory) as place:
        weights = jax.tree.map(np.asarray, goldens.rule_variables(model))
        write_model(place, card, {"model": weights})
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train shortly on digit scenes on one device; return the workdir and the output."""
    workdir = tmp_path_factory.mktemp("runs") / "scenes"
    (printed,) = finish([start("--workdir", str(workdir), *DIGITS)])
    return workdir, printed


def test_a_run_on_digit_scenes_leaves_a_model_and_its_pictures(trained: tuple[Path, str]):
    workdir, printed = trained
    (record,) = lines(workdir / "metrics.jsonl")
    for key in ("test_mean_iou", "ema_test_mean_accuracy", "ema_test_pixel_accuracy"):
        assert 0 <= record[key] <= 100
    assert f"mIoU {record['ema_test_mean_iou']:.2f}% on 500 test images" in printed
    for name in ("curves.png", "confusion_matrix.png", "scenes.png"):
        assert form(workdir / name)[1][0] > 300
    card = json.loads((workdir / "model" / "model.json").read_text())
    assert (card["task"], card["architecture"]["head"]) == ("segmentation", "upernet")
    assert card["classes"]["names"][:2] == ["background", "0"]
    model, variables = am.load_pretrained(workdir / "model", "model")
    assert isinstance(model, am.ActiveSegmentor)
    counts = [leaf for leaf in jax.tree.leaves(variables["batch_stats"]) if leaf.ndim == 0]
    assert {int(count) for count in counts} == {STEPS}


def test_two_hosts_take_the_steps_of_one_device(trained: tuple[Path, str], tmp_path: Path):
    """Batch norm must use the statistics of the global batch, half of which is on each host."""
    workdir = tmp_path / "run"
    finish(start_two("--workdir", str(workdir), *DIGITS))
    ours, expected = (lines(path / "steps.jsonl") for path in (workdir, trained[0]))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    a, b = (lines(path / "metrics.jsonl")[0] for path in (workdir, trained[0]))
    assert a["test_pixel_accuracy"] == pytest.approx(b["test_pixel_accuracy"], abs=0.01)
    a, b = (am.load_pretrained(path / "model")[1] for path in (workdir, trained[0]))
    for ours, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_evaluate_finds_what_training_found(trained: tuple[Path, str]):
    workdir, _ = trained
    result = run("evaluate", workdir / "model", "--data", "digit_scenes", "--batch-size", 50)
    assert result.returncode == 0, result.stderr
    found, last = json.loads(result.stdout.splitlines()[-1]), lines(workdir / "metrics.jsonl")[0]
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        assert found["model"][key] == pytest.approx(last[f"test_{key}"], abs=1e-9)
        assert found["ema"][key] == pytest.approx(last[f"ema_test_{key}"], abs=1e-9)
    assert found["protocol"] == "whole images"
    for part in ("background", "IoU", "500 test images, whole images: mIoU", "mAcc", "aAcc"):
        assert part in result.stdout
    assert "500 images; the network is compiled for 1 sizes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "CLASSIFIER", "--data", "digits", "--multi-scale"), "--multi-scale is for"),
        (("evaluate", "MODEL", "--data", "digit_scenes", "--image-size", "64"), "--image-size is"),
        (("evaluate", "MODEL", "--data", "digits"), "no data set of scenes 'digits', expected"),
        (("evaluate", "MODEL", "--data", "digit_scenes", "--size-multiple", "0"), "is 0, expected"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(
    arguments: tuple[str, ...],
    message: str,
    trained: tuple[Path, str],
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Run the command in this process, which is faster."""
    places = {"MODEL": str(trained[0] / "model"), "CLASSIFIER": str(classifier)}
    monkeypatch.setattr(sys, "argv", [places.get(argument, argument) for argument in arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_ade20k_recipe_trains_from_a_classifier_and_is_tested(classifier: Path, tmp_path: Path):
    """Run a few steps of the real config; one image is smaller than the crop and gets padded."""
    sizes = [(70, 90), (40, 200), (33, 40), (96, 64)]
    save_ade20k(
        tmp_path,
        [mask(*size, 0, 1, 2, 150) for size in sizes],
        [mask(60, 80, 3, 4), mask(64, 50, 7)],
    )
    workdir = tmp_path / "run"
    settings = SMALL | {"init_from": classifier, "data.name": f"ade20k:{tmp_path}"}
    config = ROOT / "configs" / "ade20k_upernet.py"
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    (printed,) = finish([start("--config", str(config), "--workdir", str(workdir), *flags)])
    assert f"starting from the model weights in {classifier}: the backbone, under a new" in printed
    assert "mIoU" in printed
    rates = [line["learning_rate"] for line in lines(workdir / "steps.jsonl")]
    assert rates[0] == pytest.approx(6e-11, rel=1e-3)
    assert rates[1] == pytest.approx(2 / 3 * 6e-5 * (1e-6 + (1 - 1e-6) / 1500), rel=1e-4)

    options = ("--data", f"ade20k:{tmp_path}", "--size-multiple", 32)
    result = run("evaluate", workdir / "model", *options)
    assert result.returncode == 0, result.stderr
    found, last = json.loads(result.stdout.splitlines()[-1]), lines(workdir / "metrics.jsonl")[-1]
    assert found["images"] == 2
    assert found["model"]["pixel_accuracy"] == pytest.approx(last["test_pixel_accuracy"])
    assert found["protocol"].endswith("multiples of 32 (not as published)")
    assert "2 images; the network is compiled for 2 sizes" in result.stderr


def test_the_semantic_fpn_recipe_trains_on_scene_parse150_and_goes_on_after_a_failure(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The data are from mock_data: random images with the metadata of the real builder.

    The run has five steps, two per epoch. It is tested after the second epoch and at the end.
    """
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    prepare_scene_parse150(tmp_path, monkeypatch, lambda _: mask(30, 40, 1))
    config = load_config(f"{ROOT}/configs/ade20k_fpn.py:active_tiny")
    splits = {"data.train_split": "train", "data.test_split": "test"}
    config.update_from_flattened_dict(
        {**SMALL, **splits, "init_from": str(classifier), "data.name": "tfds:scene_parse150"}
        | {"head.neck_channels": 16, "test.size_multiple": 256}  # makes all images one size
        | {"steps": 5, "test.every_epochs": 2, "checkpoint.every_steps": 1, "augment.flip": 0.0}
    )
    printed = io.StringIO()

    def fail(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise RuntimeError("in the middle of an epoch")

    console = Console(file=printed, width=200)
    with tfds.testing.mock_data(
        data_dir=str(tmp_path),
        policy=tfds.testing.MockPolicy.USE_FILES,
        as_data_source_fn=lambda *args, **kwargs: mocked_records(*args, **kwargs, number=5),
    ):
        train(config, tmp_path / "whole", console)
        with pytest.raises(RuntimeError, match="in the middle"):
            train(config, tmp_path / "again", console, trackers=[fail])
        train(config, tmp_path / "again", console)
    assert "5 images to train, 5 to test" in printed.getvalue()
    assert "going on from step" in printed.getvalue()
    whole, again = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "again"))
    assert [record["step"] for record in whole] == [2, 4, 5]
    assert ["test_mean_iou" in record for record in whole] == [False, True, True]
    for a, b in zip(whole, again, strict=True):
        assert a["train_loss"] == b["train_loss"]
        assert a.get("test_pixel_accuracy") == b.get("test_pixel_accuracy")
    a, b = (am.load_pretrained(tmp_path / name / "model")[1] for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    counts = [leaf for leaf in jax.tree.leaves(a["batch_stats"]) if leaf.ndim == 0]
    assert {int(count) for count in counts} == {5}


def test_a_mask_with_a_class_that_is_none_stops_training_with_its_name(
    classifier: Path, tmp_path: Path
):
    """The error reaches the user although a worker process finds the mask."""
    save_ade20k(tmp_path, [mask(64, 64, 1, 151), mask(64, 64, 1, 160)], [mask(64, 64, 1)])
    data = {"data.name": f"ade20k:{tmp_path}", "data.num_workers": 1}
    settings = {**SMALL, **data, "init_from": classifier}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = ROOT / "configs" / "ade20k_upernet.py"
    process = start("--config", str(config), "--workdir", str(tmp_path / "run"), *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert "ADE_train_0000000" in line
    assert "expected 1 to 150 for the 150 classes, or 0 or 255 for none" in line

"""`python -m activemlp_jax.evaluate` as real processes: each image counts once, anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
from commands import error_line
from PIL import Image
from processes import ROOT, free_address
from rich.console import Console

from activemlp_jax import ActiveMLP, evaluate
from activemlp_jax.data.image_transforms import eval_transform
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.data.sources import open_source
from activemlp_jax.tasks.classification import Classification, hardest_classes
from activemlp_jax.tasks.segmentation_metrics import class_table
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import write_model
from activemlp_jax.weights.torch_files import read_checkpoint
from activemlp_jax.weights.torch_names import from_torch

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("evaluate")
MODULE = ("-m", "activemlp_jax.evaluate")
PREPROCESSING = Preprocessing(image_size=32, resize_factor=1.0)


def environment(devices: int = 1) -> dict[str, str]:
    variables = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return {**os.environ, **variables, "PYTHONPATH": str(ROOT)}


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(devices), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def last_line(output: str) -> dict[str, Any]:
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model directory of the micro checkpoint, for digits of 32 x 32 pixels."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    network = ActiveMLP(**goldens.MICRO)
    weights = read_checkpoint(goldens.DATA / "micro_checkpoint.pth").weights
    variables = {kind: from_torch(state_dict) for kind, state_dict in weights.items()}
    card = ModelCard(network, PREPROCESSING, ("ema", "model"), "ema", tuple("0123456789"))
    with write_directory_aside(directory) as place:
        write_model(place, card, variables)
    return directory


@pytest.fixture(scope="module")
def on_one_device(model: Path) -> str:
    return finish(start(*MODULE, str(model), "--data", "digits", "--batch-size", "100"))


def counts() -> dict[str, tuple[int, int]]:
    """Count with PyTorch the digits whose label is the first guess or among the first five."""
    import torch

    from activemlp_jax.torch_reference.active_mlp import TorchActiveMLP

    source = open_source("digits", "test")
    examples = [source[index] for index in range(len(source))]
    pixels = np.stack([eval_transform(example.image, PREPROCESSING) for example in examples])
    images = (pixels / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    labels = np.array([example.label for example in examples])
    network = TorchActiveMLP(**goldens.MICRO)
    found = {}
    weights = read_checkpoint(goldens.DATA / "micro_checkpoint.pth").weights
    for kind, state_dict in weights.items():
        network.load_state_dict({key: torch.tensor(value) for key, value in state_dict.items()})
        with torch.inference_mode():
            logits = network(torch.tensor(images, dtype=torch.float32)).numpy()
        ranks = (logits > logits[np.arange(len(labels)), labels, None]).sum(-1)
        found[kind] = (int((ranks < 1).sum()), int((ranks < 5).sum()))
    return found


def test_accuracy_of_both_weights_is_that_of_pytorch(on_one_device: str):
    record = last_line(on_one_device)
    assert record["images"] == 360
    for (kind, (right, among_five)), line in zip(
        counts().items(), on_one_device.splitlines(), strict=False
    ):
        acc1, acc5 = 100 * right / 360, 100 * among_five / 360
        assert record[kind]["acc1"] == pytest.approx(acc1, abs=1e-9)
        assert record[kind]["acc5"] == pytest.approx(acc5, abs=1e-9)
        expected = f"[{kind}] accuracy on 360 test images: {acc1:.3f}% acc@1 | {acc5:.3f}% acc@5"
        assert line == expected
    assert record["ema"] != record["model"]


def assert_same(output: str, expected: str) -> None:
    """Assert equal counts, and losses that are equal up to the order of summation."""
    ours, theirs = last_line(output), last_line(expected)
    for kind in ("ema", "model"):
        assert ours[kind]["loss"] == pytest.approx(theirs[kind]["loss"], rel=1e-5)
        del ours[kind]["loss"], theirs[kind]["loss"]
    assert ours == theirs


def save_digits(folder: Path, count: int, split: str = "test") -> None:
    """Save the first `count` digits of a split as pictures in class folders."""
    source = open_source("digits", split)
    for index in range(count):
        image, label = source[index]
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{index}.png")


@pytest.fixture(scope="module")
def odd_number(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return a command for 1,003 images, which 2, 3 or 4 devices cannot share equally."""
    folder = tmp_path_factory.mktemp("digits")
    save_digits(folder, 1003, "train")
    return (*MODULE, str(model), "--data", f"folder:{folder}", "--batch-size", "100")


@pytest.fixture(scope="module")
def odd_number_on_one_device(odd_number: tuple[str, ...]) -> str:
    return finish(start(*odd_number))


@pytest.mark.parametrize("devices", [3, 4])
def test_each_image_counts_once_on_any_number_of_devices(
    devices: int, odd_number: tuple[str, ...], odd_number_on_one_device: str
):
    assert "accuracy on 1003 test images" in odd_number_on_one_device
    assert_same(finish(start(*odd_number, devices=devices)), odd_number_on_one_device)


def test_each_image_counts_once_on_two_hosts(
    odd_number: tuple[str, ...], odd_number_on_one_device: str
):
    address = f"--coordinator={free_address()}"
    hosts = [("--num-processes=2", "--process-id=0"), ("--num_processes=2", "--process_id=1")]
    processes = [start(*odd_number, address, *options, devices=2) for options in hosts]
    outputs = [finish(process) for process in processes]
    assert_same(outputs[0], odd_number_on_one_device)
    assert "accuracy" not in outputs[1], "the first host speaks for all"


def test_a_folder_counts_as_the_same_images_elsewhere(model: Path, tmp_path: Path):
    save_digits(tmp_path / "val", 360)
    arguments = (str(model), "--data", f"folder:{tmp_path}")
    ours = last_line(finish(start(*MODULE, *arguments)))
    for kind, (right, among_five) in counts().items():
        assert ours[kind]["acc1"] == pytest.approx(100 * right / 360, abs=1e-9)
        assert ours[kind]["acc5"] == pytest.approx(100 * among_five / 360, abs=1e-9)


def test_the_hardest_classes_are_named_with_what_they_are_taken_for():
    confusion = np.array([[8, 2, 0], [0, 0, 0], [1, 3, 0]])
    assert hardest_classes(confusion, ("ant", "bee", "cat")) == [
        {"class": "cat", "accuracy": 0.0, "images": 4, "taken_for": "bee"},
        {"class": "ant", "accuracy": 80.0, "images": 10, "taken_for": "bee"},
    ]
    assert hardest_classes(np.diag([3, 4]), ("ant", "bee")) == []


def test_the_hardest_classes_are_printed_and_recorded(on_one_device: str):
    hardest = last_line(on_one_device)["ema"]["hardest"]
    (line,) = [line for line in on_one_device.splitlines() if "hardest classes" in line]
    assert 0 < len(hardest) <= 5
    for row in hardest:
        assert row["class"] in "0123456789"
        assert f"{row['class']} ({row['accuracy']:.1f}% of {row['images']}" in line


def test_of_two_classes_nothing_is_said_of_five_guesses_and_names_are_printable(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    sums = {"confusion": np.array([[2, 0], [1, 1]]), "top5": 4, "loss": 2.0, "examples": 4}
    task = Classification(ActiveMLP(**goldens.MICRO), Preprocessing())
    (first, hardest), record = task.report({"ema": sums}, 4, ("cät", "dog\x1b[2J"))
    assert first == "[ema] accuracy on 4 test images: 75.000% acc@1"
    assert hardest == "[ema] hardest classes: dog?[2J (50.0% of 2, else cät)"
    assert "acc5" not in record["ema"]
    assert record["ema"]["hardest"][0]["class"] == "dog\x1b[2J"

    found = {"ema": {**sums, "confusion": np.eye(10), "loss": float("nan")}}
    monkeypatch.setattr(Classification, "make_test", lambda *_, **__: lambda *_: found)
    options = ("split", "batch_size", "num_threads", "image_size", "size_multiple")
    flags = dict.fromkeys(("multi_scale", "slide"), False)
    arguments = {"directory": str(model), "data": "digits", **dict.fromkeys(options), **flags}
    with pytest.raises(UserError, match="has a number that is not finite"):
        evaluate.evaluate(arguments)


def test_the_table_of_classes_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]):
    names = ("[red]cat[/red]", "dog[/x]", "bee\x1b[2J")
    Console(width=80).print(class_table(np.eye(3), names))
    output = capsys.readouterr().out
    for name in (*names[:2], "bee?[2J"):
        assert name in output


def test_another_image_size_just_works(model: Path):
    output = finish(start(*MODULE, str(model), "--data", "digits", "--image-size", "48"))
    assert "[ema] accuracy on 360 test images" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--data", "digit"], "no data set 'digit', expected digits, folder:PATH, tfds"),
        (["MODEL", "--data", "digits", "--split", "val"], "has the splits train, test, not 'val'"),
        (["MODEL", "--data", "folder:nowhere"], "there is no folder nowhere"),
        (["MODEL", "--data", "folder:FOLDER"], "has 2 classes, but the model has 10"),
        (["MODEL", "--data", "digits", "--image-size", "8"], "--image-size is 8, expected"),
        (["MODEL", "--data", "digits", "--batch-size", "0"], "--batch-size is 0, expected"),
        (["nothing", "--data", "digits"], "nothing is not a model directory: there is no such"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(
    arguments: list[str], message: str, model: Path, tmp_path: Path
):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (50, 40)).save(tmp_path / name / "a.png")
    places = {"MODEL": str(model), "folder:FOLDER": f"folder:{tmp_path}"}
    line = error_line(evaluate.main, *(places.get(argument, argument) for argument in arguments))
    assert message in line


def test_a_broken_image_ends_the_evaluation_and_is_named(model: Path, tmp_path: Path):
    save_digits(tmp_path, 30)
    broken = next((tmp_path / "7").iterdir())
    broken.write_bytes(b"\x89PNG")
    line = error_line(evaluate.main, model, "--data", f"folder:{tmp_path}")
    assert f"{broken} is not a readable image" in line

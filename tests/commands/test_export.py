"""`python -m activemlp_jax.export`: what it writes runs elsewhere and gives the same numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run_main
from pictures import photo
from PIL import Image
from small_models import BACKBONE, save_model

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.export import __main__ as export
from activemlp_jax.export import stablehlo
from activemlp_jax.export.__main__ import describe
from activemlp_jax.utils.errors import UserError, install_command
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights import convert
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, read_weights, write_model

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("export")

PHOTO = "photo.jpg"
Answers = dict[str, tuple[np.ndarray, np.ndarray]]
# Conversion infers offset_interval from the names of weights; two blocks per stage leave it open.
EVERY_BLOCK = BACKBONE | {"offset_interval": 1}
CLASSIFIER = am.ActiveMLP(**EVERY_BLOCK, num_classes=3)
SEGMENTOR = am.ActiveSegmentor(EVERY_BLOCK, "upernet", 4, channels=8, aux_channels=8)
CARDS = {
    "classifier": ModelCard(
        CLASSIFIER,
        Preprocessing(image_size=32, mean=(0.5, 0.4, 0.3)),
        ("ema", "model"),
        "ema",
        ("ant", "bee", "c|t"),
        {"trained_on": "digits", "epoch": 3, "test_accuracy": 97.54321},
    ),
    "segmentor": ModelCard(
        SEGMENTOR, ScenePreprocessing(long_side=0, window=40), ("model",), "model"
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model directory for each of `CARDS`, and return their folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, card in CARDS.items():
        variables = goldens.rule_variables(card.model)
        weights = {
            kind: jax.tree.map(lambda leaf, times=times: np.asarray(times * leaf), variables)
            for times, kind in enumerate(card.kinds, 1)
        }
        with write_directory_aside(folder / name) as place:
            write_model(place, card, weights)
    return folder


@pytest.fixture(scope="module")
def exported(models: Path) -> Path:
    """Export every model, and return the folder of the exports."""
    for name in CARDS:
        export.export_model(str(models / name), str(models / "exported" / name))
    return models / "exported"


@pytest.fixture(scope="module")
def answers(models: Path) -> Answers:
    """Return seven random images and their logits for each model."""
    found = {}
    for name, side in (("classifier", 32), ("segmentor", 40)):
        images = np.random.default_rng(0).standard_normal((7, side, side, 3)).astype(np.float32)
        model, variables = am.load_pretrained(models / name)
        found[name] = images, np.asarray(jax.jit(model.apply)(variables, images))
    return found


def assert_equal_logits(found: np.ndarray, logits: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == logits.shape
    assert np.abs(logits).max() > 0.1
    assert np.abs(found - logits).max() < 1e-5


def readme_program(folder: Path, format_name: str) -> str:
    """Return the code under a format's heading in the README."""
    section = (folder / "README.md").read_text().split(f"### `model.{format_name}`")[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def with_photo(folder: Path) -> Path:
    """Save the photo that the README opens in `folder`, with odd sides, and return `folder`."""
    photo(1, 301, 427).save(folder / PHOTO, quality=95)
    return folder


def assert_answer(output: str, directory: Path, file: Path) -> None:
    """Assert that the README's program prints the package's own prediction for the photo."""
    card, (model, variables) = am.read_card(directory), am.load_pretrained(directory)
    found = [line.rsplit(" ", 1) for line in output.splitlines()]
    if isinstance(card.preprocessing, Preprocessing):
        expected = am.classify(model, variables, file, card)
        assert [name for name, _ in found] == [one.name for one in expected]
        shares = [one.probability for one in expected]
    else:
        side = card.preprocessing.window
        with Image.open(file) as whole:
            left, top = ((length - side) // 2 for length in whole.size)
            pixels = np.asarray(whole)[top : top + side, left : left + side]
        mean, std = map(np.float32, (card.preprocessing.mean, card.preprocessing.std))
        images = ((pixels / np.float32(255) - mean) / std)[None]
        labels = np.argmax(jax.jit(model.apply)(variables, images), axis=-1)
        present, counts = np.unique(labels, return_counts=True)
        assert [name for name, _ in found] == list(map(str, present))
        shares = list(counts / counts.sum())
    for (_, percent), share in zip(found, shares, strict=True):
        assert float(percent.removesuffix("%")) == pytest.approx(100 * share, abs=0.06)


@pytest.mark.parametrize("name", CARDS)
def test_stablehlo_runs_as_the_readme_says_without_this_package_and_flax(
    name: str, models: Path, answers: Answers, exported: Path, tmp_path: Path
):
    folder = with_photo(shutil.copytree(exported / name, tmp_path / name))
    images, logits = answers[name]
    np.save(tmp_path / "images.npy", images)
    program = f"""
import sys
sys.modules["activemlp_jax"] = sys.modules["flax"] = None
{readme_program(exported / name, "stablehlo")}
assert list(logits.shape) == [1, *config["output"]["shape"][1:]], logits.shape
images = np.load({str(tmp_path / "images.npy")!r})
for batch in (1, 7):
    np.save({str(tmp_path)!r} + f"/{{batch}}.npy", program(images[:batch]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_answer(done.stdout, models / name, folder / PHOTO)
    for batch in (1, 7):
        assert_equal_logits(np.load(tmp_path / f"{batch}.npy"), logits[:batch])


@pytest.mark.parametrize("name", CARDS)
def test_one_stablehlo_program_is_for_three_platforms_and_any_batch(name: str, exported: Path):
    program = jax.export.deserialize((exported / name / "model.stablehlo").read_bytes())
    config = json.loads((exported / name / "config.json").read_text())
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    for array, side in (("input", program.in_avals), ("output", program.out_avals)):
        assert [str(size) for size in side[0].shape] == list(map(str, config[array]["shape"]))
        assert side[0].dtype == config[array]["dtype"] == "float32"


SHAPE = (2, 32, 32, 3)
# Inputs that an exported function rejects, and the error messages of the runtime.
REFUSED = {
    "bfloat16": (jnp.zeros(SHAPE, jnp.bfloat16), "expected float32 and called with bfloat16", ""),
    "uint8": (np.zeros(SHAPE, np.uint8), "expected float32 and called with uint8", "tensor(uint8)"),
    "size": (np.zeros((2, 40, 40, 3), np.float32), "expected (batch, 32, 32, 3)", "Expected: 32"),
    "rank": (np.zeros((32, 32, 3), np.float32), "expected (batch, 32, 32, 3)", "Expected: 4"),
    "channels first": (
        np.zeros((2, 3, 32, 32), np.float32), "expected (batch, 32, 32, 3)", "Expected: 32",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stablehlo_program(exported: Path) -> Any:
    content = (exported / "classifier" / "model.stablehlo").read_bytes()
    return jax.jit(jax.export.deserialize(content).call)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stablehlo_takes_a_batch_of_any_size(
    batch: int, dtype: str, stablehlo_program: Any, answers: Answers
):
    """float64 inputs work too, because JAX converts them to float32."""
    images, logits = answers["classifier"]
    found = np.asarray(stablehlo_program(images[:batch].astype(dtype)))
    assert_equal_logits(found, logits[:batch])


@pytest.mark.parametrize("name", REFUSED)
def test_stablehlo_says_what_it_expected(name: str, stablehlo_program: Any, exported: Path):
    images, message, _ = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        stablehlo_program(images)
    text = (exported / "classifier" / "README.md").read_text()
    assert "It takes `[batch, 32, 32, 3]` float32, a batch of any size." in text


@pytest.mark.parametrize("name", CARDS)
def test_onnx_gives_the_same_numbers_as_the_readme_says(
    name: str,
    models: Path,
    answers: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    images, logits = answers[name]
    folder = tmp_path / "exported"
    export.export_model(str(models / name), str(folder), ["onnx"])
    monkeypatch.chdir(with_photo(folder))
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(readme_program(folder, "onnx"), names)
    assert_answer(capsys.readouterr().out, models / name, folder / PHOTO)
    for batch in (1, 3, 7):
        (found,) = names["session"].run(["logits"], {"images": images[:batch]})
        assert_equal_logits(found, logits[:batch])
    for wrong, _, message in REFUSED.values() if name == "classifier" else ():
        if message:
            with pytest.raises(Exception, match=re.escape(message)):
                names["session"].run(["logits"], {"images": wrong})
    assert str(am.__path__[0]) not in (folder / "model.onnx").read_bytes().decode("latin-1")


@pytest.mark.parametrize("name", CARDS)
def test_safetensors_give_back_the_same_bits(name: str, models: Path, exported: Path):
    card = read_card(models / name)
    variables = read_weights(models / name, card, card.default_kind)
    found = am.load_torch_checkpoint(exported / name / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (found, variables)]
    assert dtypes[0] == dtypes[1]
    assert json.loads((exported / name / "config.json").read_text())["weights"] == card.default_kind
    for kind in set(card.kinds) - {card.default_kind}:
        other = read_weights(models / name, card, kind)["params"]["head"]["kernel"]
        assert not np.array_equal(found["params"]["head"]["kernel"], other)


@pytest.mark.parametrize("name", CARDS)
def test_a_model_directory_made_of_safetensors_knows_all(name: str, exported: Path, tmp_path: Path):
    result = run_main(convert.main, exported / name / "model.safetensors", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    ours, again = CARDS[name].to_json(), read_card(tmp_path / "again").to_json()
    kind = CARDS[name].default_kind
    assert again.pop("weights") == {"kinds": (kind,), "default": kind}
    source = again.pop("source")
    assert source | ours.pop("source") == source
    assert ("copied_from" if name == "classifier" else "file") in source
    del ours["weights"]
    assert json.dumps(again) == json.dumps(ours)


@pytest.mark.parametrize("name", CARDS)
def test_no_file_tells_where_it_was_made(name: str, exported: Path):
    files = sorted(file.name for file in (exported / name).iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "model.stablehlo"]
    for file in files:
        content = (exported / name / file).read_bytes()
        for place in (Path(export.__file__).parent, exported, Path(sys.prefix)):
            assert str(place).encode() not in content, f"{place} is in {file}"


def test_a_model_of_an_unknown_task_is_not_exported(tmp_path: Path):
    save_model(tmp_path / "model", CLASSIFIER, Preprocessing(), task="rotation")
    with pytest.raises(UserError, match="model is for the task 'rotation', expected class"):
        export.export_model(str(tmp_path / "model"), str(tmp_path / "out"))


def test_a_thousand_classes_without_names_get_imagenets_names():
    model = CLASSIFIER.clone(num_classes=1000)
    card = ModelCard(model, Preprocessing(image_size=32), ("model",), "model")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert describe(card, variables)["classes"]["names"][:2] == ("tench", "goldfish")
    names = (*(f"n{label:08}" for label in range(999)), "n01440764")
    found = describe(replace(card, class_names=names), variables)["classes"]["names"]
    assert found[998:] == ("n00000998", "tench (n01440764)")


def test_another_image_size_is_exported_and_described(models: Path, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    options = ("--format", "stablehlo", "--image-size", "50")
    result = run_main(export.main, models / "classifier", folder, *options)
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"]["image_size"] == 50
    assert config["input"]["shape"] == ["batch", 50, 50, 3]
    program = jax.export.deserialize((folder / "model.stablehlo").read_bytes())
    assert program.in_avals[0].shape[1:] == (50, 50, 3)
    lines = result.stdout.splitlines()
    expected = f"wrote {folder}: the averaged (EMA) weights, images of 50 by 50 pixels"
    assert lines[0] == expected
    files = [line.split()[0] for line in lines[1:]]
    assert files == ["model.stablehlo", "config.json", "README.md"]


def test_another_image_size_is_that_of_a_segmentation_models_windows():
    card = export.with_image_size(CARDS["segmentor"], 50)
    assert card.preprocessing == ScenePreprocessing(long_side=0, window=50)


def test_a_failed_export_leaves_jax_as_it_was(tmp_path: Path):
    frames = jax.config.jax_traceback_in_locations_limit
    variables = jax.eval_shape(CLASSIFIER.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    with pytest.raises(ValueError, match="expected sides of at least 32"):
        stablehlo.write_stablehlo(tmp_path / "model", CLASSIFIER, zeros, 16)
    assert jax.config.jax_traceback_in_locations_limit == frames


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "OUT"], "nothing is not a model directory: there is no such folder"),
        (["MODEL", "OUT", "--image-size", "31"], "--image-size is 31, expected at least 32"),
        (["MODEL", "OUT", "--image-size", f"{10**9}"], "is 1000000000, expected at most 16,384"),
        (["MODEL", "THERE"], "THERE is already there; give another place"),
        (["MODEL", "THERE/file"], "THERE/file is already there; give another place"),
        (
            ["MODEL", "THERE/file/out"],
            "THERE/file/out cannot be written: THERE/file is not a folder",
        ),
        (
            ["MODEL", "OUT", "--format", "onnx"],
            f"--format onnx needs onnx and onnxscript: {install_command('onnx')}",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(
    arguments: list[str],
    message: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    places = {"MODEL": models / "classifier", "OUT": tmp_path / "out"}
    places |= {"THERE": tmp_path / "there", "THERE/file": tmp_path / "there" / "file"}
    places |= {"THERE/file/out": tmp_path / "there" / "file" / "out"}
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    line = error_line(export.main, *(places.get(value, value) for value in arguments))
    assert message.replace("THERE", str(tmp_path / "there")) in line
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_nothing_is_left_of_an_export_that_fails(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "write_checkpoint", full)
    arguments = (models / "classifier", tmp_path / "out", "--format", "safetensors")
    line = error_line(export.main, *arguments)
    assert "model.safetensors: No space left on device" in line
    assert list(tmp_path.iterdir()) == []

"""Model directories: written whole or not at all, and read with what is wrong named."""

import json
import shutil
from pathlib import Path
from typing import Any

import goldens
import jax
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.errors import UserError
from activemlp_jax.weights.model_directory import (
    ModelCard,
    check_classes,
    read_card,
    read_weights,
    variant_name,
    whole_or_nothing,
    write_model,
)

MODEL = am.ActiveMLP(**goldens.MICRO)
NAMES = tuple("abcdefghij")


def variables(seed: int) -> Any:
    return jax.tree.map(np.asarray, goldens.rule_variables(MODEL, seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both kinds of weights."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    preprocessing = Preprocessing(64, 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    card = ModelCard(MODEL, preprocessing, ("ema", "model"), "ema", NAMES, {"epoch": 3})
    with whole_or_nothing(directory) as place:
        write_model(place, card, {"ema": variables(1), "model": variables(2)})
    return directory


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def assert_same(ours: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)


def test_the_card_says_all_that_was_written(written: Path):
    card = read_card(written)
    assert card.model == MODEL
    assert card.preprocessing == Preprocessing(64, 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.kinds, card.default_kind) == (("ema", "model"), "ema")
    assert (card.class_names, card.source) == (NAMES, {"epoch": 3})
    assert card.name is None


def test_published_variants_are_known_by_name():
    for name in am.list_models():
        assert variant_name(am.create_model(name, num_classes=7, drop_path_rate=0.2)) == name
        assert variant_name(am.create_segmentor(name, num_classes=7, drop_path_rate=0.2)) == name


def test_weights_are_read_back_bit_for_bit(written: Path):
    card = read_card(written)
    assert_same(read_weights(written, card, "ema"), variables(1))
    assert_same(read_weights(written, card, "model"), variables(2))


@pytest.mark.parametrize(("weights", "seed"), [("auto", 1), ("ema", 1), ("model", 2)])
def test_load_pretrained_gives_a_model_and_its_weights(written: Path, weights: str, seed: int):
    model, found = am.load_pretrained(written, weights)
    assert model == MODEL
    assert_same(found, variables(seed))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("head", goldens.SEG_MICRO)
def test_a_segmentation_model_is_read_back_with_its_statistics(head: str, tmp_path: Path):
    model = am.ActiveSegmentor(**goldens.SEG_MICRO[head])
    expected = jax.tree.map(np.asarray, goldens.rule_variables(model))
    preprocessing = ScenePreprocessing(0, 96, 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    card = ModelCard(model, preprocessing, ("model",), "model", NAMES[:7], {"epoch": 3})
    with whole_or_nothing(tmp_path / "scenes") as place:
        write_model(place, card, {"model": expected})
    again = read_card(tmp_path / "scenes")
    assert again == card
    assert again.is_segmentor
    found, weights = am.load_pretrained(tmp_path / "scenes")
    assert found == model
    assert set(weights) == {"params", "batch_stats"}
    assert_same(weights, expected)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, weights)
    assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, expected)


def test_a_failure_leaves_nothing_behind_and_what_was_there_alone(tmp_path: Path):
    directory = tmp_path / "model"

    def fail() -> None:
        with whole_or_nothing(directory) as place:
            (place / "half").write_text("written")
            raise UserError("no")

    with pytest.raises(UserError):
        fail()
    assert list(tmp_path.iterdir()) == []
    directory.mkdir()
    (directory / "old").write_text("kept")
    with pytest.raises(UserError):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_an_older_directory_is_replaced(tmp_path: Path):
    for name in ("old", "new"):
        with whole_or_nothing(tmp_path / "model") as place:
            (place / name).write_text("text")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def rewrite(directory: Path, **changes: Any) -> None:
    path = directory / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, r"model\.json is no description of a model: .*format is 1, expected 2"),
        ({"task": "detection"}, r"task is 'detection', which is unknown"),
        ({"task": "segmentation"}, r"no description of a model: TypeError"),
        ({"architecture": {"depths": [2, 2]}}, r"no description of a model: TypeError"),
        ({"classes": None}, r"no description of a model: TypeError"),
        ({"weights": {"kinds": ["model"], "default": "ema"}}, r"'ema' are the default, but there"),
        ({"classes": {"number": 7, "names": None}}, r"2 parameters differ; head/\w+ is"),
        ({"preprocessing": {"image_size": 3, "mean": [], "std": []}}, r"image_size is 3, expected"),
    ],
)
def test_a_card_that_is_wrong_is_named(copied: Path, changes: Any, message: str):
    rewrite(copied, **changes)
    with pytest.raises(UserError, match=message) as error:
        am.load_pretrained(copied)
    assert "\n" not in str(error.value)


def test_what_is_no_model_directory_is_told_apart(copied: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    copied.rename(tmp_path / "run" / "model")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    for name, message in (
        ("nothing", "there is no such folder"),
        ("weights.pth", r"it is a file; convert_torch_weights\.py makes a model directory of"),
        ("run", f"it is that of a run, whose model is {tmp_path}/run/model"),
        ("run/model/weights", r"it has no model\.json; convert_torch_weights\.py and train\.py"),
    ):
        with pytest.raises(UserError, match=f"{name} is no model directory: {message}"):
            am.load_pretrained(tmp_path / name)


@pytest.mark.parametrize("names", [NAMES, None])
def test_another_number_of_classes_is_said_to_be_the_data_sets(names: tuple[str, ...] | None):
    card = ModelCard(MODEL, Preprocessing(), ("model",), "model", names)
    message = "^folder:pets has 2 classes, but the model has 10; fine-tune it on them first$"
    with pytest.raises(UserError, match=message):
        check_classes(card, ("cat", "dog"), "folder:pets")


def test_a_directory_that_is_incomplete_is_named(copied: Path):
    with pytest.raises(UserError, match=r"copied has no 'average' weights, only 'ema', 'model'"):
        am.load_pretrained(copied, "average")
    shutil.rmtree(copied / "weights" / "ema")
    with pytest.raises(UserError, match=r"weights/ema cannot be read"):
        am.load_pretrained(copied)
    for file in (copied / "weights" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"weights/model cannot be read"):
        am.load_pretrained(copied, "model")
    (copied / "model.json").write_text("{oops")
    with pytest.raises(UserError, match=r"model\.json is no description of a model"):
        am.load_pretrained(copied)

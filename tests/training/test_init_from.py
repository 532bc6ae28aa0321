"""Runs that start from a model directory, and the model directory that a run writes."""

from pathlib import Path
from typing import Any
from unittest import mock

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.tasks.registry import make_task
from activemlp_jax.training import init_from
from activemlp_jax.training.config import default_config
from activemlp_jax.training.init_from import (
    adopt_architecture,
    initial_variables,
)
from activemlp_jax.training.results import write_result
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, write_model

MODEL = am.ActiveMLP(**goldens.MICRO)
Saying = list[str]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model directory of ten classes, in half precision."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    card = ModelCard(MODEL, Preprocessing(), ("model",), "model")
    variables = goldens.rule_variables(MODEL)
    with write_directory_aside(directory) as place:
        half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), variables)
        write_model(place, card, {"model": half})
    return directory


def config(pretrained: Path, **changes: Any) -> Any:
    config = default_config()
    config.init_from = str(pretrained)
    config.update_from_flattened_dict(changes)
    return adopt_architecture(config)


def start(config: Any, num_classes: int) -> tuple[Any, Saying]:
    said: Saying = []
    with mock.patch.object(init_from.log, "info", said.append):
        return initial_variables(config, make_task(config, num_classes)), said


def test_the_architecture_is_that_of_the_weights_and_the_rest_that_of_the_config(pretrained: Path):
    adopted = config(pretrained, **{"model.drop_path_rate": 0.3, "epochs": 7})
    assert make_task(adopted, 10).model.clone(drop_path_rate=0.0, dtype=jnp.float32) == MODEL
    assert (adopted.model.drop_path_rate, adopted.epochs) == (0.3, 7)


def test_without_init_from_the_config_is_as_it_was():
    plain = default_config()
    assert adopt_architecture(plain) is plain


def test_the_same_number_of_classes_keeps_the_head(pretrained: Path):
    variables, said = start(config(pretrained), 10)
    assert said == [f"starting from the model weights in {pretrained}: head kept, 10 classes"]
    for ours, expected in zip(
        jax.tree.leaves(variables),
        jax.tree.leaves(goldens.rule_variables(MODEL)),
        strict=True,
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)


def test_another_number_of_classes_draws_a_new_head_and_says_so(pretrained: Path):
    variables, said = start(config(pretrained, seed=3), 7)
    params = variables["params"]
    assert said == [
        f"starting from the model weights in {pretrained}: "
        "head re-initialized, 10 classes there and 7 here"
    ]
    kernel = np.asarray(params["head"]["kernel"])
    assert kernel.shape == (32, 7)
    assert kernel.std() == pytest.approx(0.02, rel=0.2)
    assert not np.asarray(params["head"]["bias"]).any()
    rule = goldens.rule_variables(MODEL)["params"]
    np.testing.assert_allclose(params["norm"]["scale"], rule["norm"]["scale"], rtol=1e-3)
    other_seed, _ = start(config(pretrained, seed=4), 7)
    assert (other_seed["params"]["head"]["kernel"] != kernel).any()


@pytest.mark.parametrize("size", [32, 48, 70])
def test_another_image_size_just_works(pretrained: Path, size: int):
    adopted = config(pretrained, **{"data.image_size": size})
    model = make_task(adopted, 7).model
    variables, _ = start(adopted, 7)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 7)


def test_a_directory_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing is not a model directory"):
        config(tmp_path / "nothing")


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_the_result_of_a_run_is_loaded_as_any_model(ema_decay: float, tmp_path: Path):
    settings = default_config()
    settings.model.embed_dims = (8, 16, 24, 32)
    task = make_task(settings, 3)
    raw = goldens.rule_variables(task.model)
    averaged = jax.tree.map(lambda leaf: leaf + 1, raw)
    weights = {"ema": averaged, "model": raw} if ema_decay else {"model": raw}
    weights = jax.tree.map(np.asarray, weights)
    names = ("cat", "dog", "owl")
    write_result(tmp_path / "model", task, weights, names, {"epoch": 2})

    card = read_card(tmp_path / "model")
    assert card.class_names == names
    assert card.kinds == (("ema", "model") if ema_decay else ("model",))
    assert card.preprocessing.image_size == settings.data.image_size
    _, variables = am.load_pretrained(tmp_path / "model")
    expected = averaged if ema_decay else raw
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def segment(pretrained: Path, num_classes: int, **changes: Any) -> tuple[Any, Saying, Any]:
    """Start a segmentation run; return its variables, its messages and its model."""
    widths = {"head.channels": 16, "head.aux_channels": 8}
    settings = config(pretrained, **{"task": "segmentation", **widths, **changes})
    variables, said = start(settings, num_classes)
    model = make_task(settings, num_classes).model
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, dict(expected))
    return variables, said, model


def test_a_classifiers_backbone_starts_a_segmentation_model(pretrained: Path):
    variables, said, model = segment(pretrained, 7)
    assert said == [
        f"starting from the model weights in {pretrained}: the backbone, under a new head"
    ]
    assert model.backbone["depths"] == MODEL.depths
    rule, ours = goldens.rule_variables(MODEL)["params"], variables["params"]["active_mlp"]
    assert set(rule) - set(ours) == {"norm", "head"}
    for name in ours:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            ours[name],
            rule[name],
        )
    assert (variables["params"]["norms_0"]["scale"] == 1).all()
    assert int(variables["batch_stats"]["decode_head"]["bottleneck"]["bn"]["count"]) == 0


def test_a_segmentation_model_gives_its_head_too_but_for_other_classes(tmp_path: Path):
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"])
    card = ModelCard(model, ScenePreprocessing(), ("model",), "model")
    there = jax.tree.map(np.asarray, goldens.rule_variables(model))
    with write_directory_aside(tmp_path / "micro") as place:
        write_model(place, card, {"model": there})
    directory = tmp_path / "micro"
    same, said, _ = segment(directory, 7, **{"head.channels": 0})
    assert said == [f"starting from the model weights in {directory}: head kept, 7 classes"]
    jax.tree.map(np.testing.assert_array_equal, same, there)
    other, said, _ = segment(directory, 3, **{"head.channels": 0})
    assert said[0].endswith("head re-initialized, 7 classes there and 3 here")
    ours, theirs = other["params"]["decode_head"], there["params"]["decode_head"]
    jax.tree.map(np.testing.assert_array_equal, ours["fusion"], theirs["fusion"])
    assert not ours["classifier"]["conv_seg"]["bias"].any()
    with pytest.raises(
        UserError, match=r"a segmentation model, and config\.task is classification"
    ):
        config(directory)


def test_the_kind_of_weights_to_start_from_can_be_chosen(pretrained: Path):
    with pytest.raises(UserError, match=r"has no 'ema' weights, only 'model'"):
        start(config(pretrained, init_weights="ema"), 10)
    _, said = start(config(pretrained, init_weights="model"), 10)
    assert said[0].startswith("starting from the model weights")

"""A model directory as the start of a run, and as its end."""

from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.errors import UserError
from activemlp_jax.training.config import build_model, default_config
from activemlp_jax.training.pretrained import (
    adopt_architecture,
    initial_params,
    write_result,
)
from activemlp_jax.weights.model_directory import (
    ModelCard,
    read_card,
    whole_or_nothing,
    write_model,
)

MODEL = am.ActiveMLP(**goldens.MICRO)
Saying = list[str]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of ten classes, in half precision."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    card = ModelCard(MODEL, Preprocessing(), ("model",), "model")
    params = goldens.rule_variables(MODEL)["params"]
    with whole_or_nothing(directory) as place:
        half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
        write_model(place, card, {"model": half})
    return directory


def config(pretrained: Path, **changes: Any) -> Any:
    config = default_config()
    config.init_from = str(pretrained)
    config.update_from_flattened_dict(changes)
    return adopt_architecture(config)


def start(config: Any, num_classes: int) -> tuple[Any, Saying]:
    said: Saying = []
    return initial_params(config, build_model(config, num_classes), said.append), said


def test_the_architecture_is_that_of_the_weights_and_the_rest_that_of_the_config(pretrained: Path):
    adopted = config(pretrained, **{"model.drop_path_rate": 0.3, "epochs": 7})
    assert build_model(adopted, 10).clone(drop_path_rate=0.0, dtype=jnp.float32) == MODEL
    assert (adopted.model.drop_path_rate, adopted.epochs) == (0.3, 7)


def test_without_init_from_the_config_is_as_it_was():
    plain = default_config()
    assert adopt_architecture(plain) is plain


def test_the_same_number_of_classes_keeps_the_head(pretrained: Path):
    params, said = start(config(pretrained), 10)
    assert said == [f"starting from the model weights in {pretrained}: head kept, 10 classes"]
    for ours, expected in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(goldens.rule_variables(MODEL)["params"]),
        strict=True,
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6)


def test_another_number_of_classes_draws_a_new_head_and_says_so(pretrained: Path):
    params, said = start(config(pretrained, seed=3), 7)
    assert said == [
        f"starting from the model weights in {pretrained}: "
        "head re-initialised, 10 classes there and 7 here"
    ]
    kernel = np.asarray(params["head"]["kernel"])
    assert kernel.shape == (32, 7)
    assert kernel.std() == pytest.approx(0.02, rel=0.2)
    assert not np.asarray(params["head"]["bias"]).any()
    rule = goldens.rule_variables(MODEL)["params"]
    np.testing.assert_allclose(params["norm"]["scale"], rule["norm"]["scale"], rtol=1e-3)
    other_seed, _ = start(config(pretrained, seed=4), 7)
    assert (other_seed["head"]["kernel"] != kernel).any()


@pytest.mark.parametrize("size", [32, 48, 70])
def test_another_image_size_just_works(pretrained: Path, size: int):
    adopted = config(pretrained, **{"data.image_size": size})
    model = build_model(adopted, 7)
    params, _ = start(adopted, 7)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert jax.eval_shape(model.apply, {"params": params}, images).shape == (2, 7)


def test_a_directory_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing is no model directory"):
        config(tmp_path / "nothing")


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_the_result_of_a_run_is_loaded_as_any_model(ema_decay: float, tmp_path: Path):
    settings = default_config()
    settings.model.embed_dims = (8, 16, 24, 32)
    model = build_model(settings, 3)
    params = goldens.rule_variables(model)["params"]
    averaged = jax.tree.map(lambda leaf: leaf + 1, params)
    weights = {"ema": averaged, "model": params} if ema_decay else {"model": params}
    weights = jax.tree.map(np.asarray, weights)
    names = ("cat", "dog", "owl")
    write_result(tmp_path / "model", settings, model, weights, names, {"epoch": 2})

    card = read_card(tmp_path / "model")
    assert card.class_names == names
    assert card.kinds == (("ema", "model") if ema_decay else ("model",))
    assert card.preprocessing.image_size == settings.data.image_size
    _, variables = am.load_pretrained(tmp_path / "model")
    expected = averaged if ema_decay else params
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)

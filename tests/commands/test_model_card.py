"""The README of an export says what is known of the weights, and claims nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BACKBONE

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.export.__main__ import describe
from activemlp_jax.export.readme import write_readme
from activemlp_jax.utils.errors import one_line
from activemlp_jax.weights.model_directory import ModelCard

MODEL = am.ActiveMLP(**BACKBONE, num_classes=3)
NAMES = ("ant", "bee", "c|t")
CARD = ModelCard(MODEL, Preprocessing(image_size=32), ("model",), "model", NAMES)
FILES = {"model.stablehlo": {"platforms": ["cpu", "tpu"], "jax": "0.10.2"}, "model.safetensors": {}}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    variables = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return describe(CARD, variables) | {"files": FILES}


def readme(
    folder: Path, config: dict[str, Any], source: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the README for weights with this `source`, and its parsed YAML header."""
    path = folder / "README.md"
    write_readme(path, replace(CARD, source=source), config)
    text = path.read_text(encoding="utf-8")
    return text, yaml.safe_load(text.split("---\n")[1])


def test_the_readme_says_what_training_measured(tmp_path: Path, config: dict[str, Any]):
    source = {"trained_on": "digits", "epoch": 3, "test_accuracy": 97.54321}
    text, header = readme(tmp_path, config, source)
    assert "accuracy 97.54% on the test images of `digits`" in text
    assert "`ant`, `bee`, `c/t`" in text, "a bar would end the cell of the table"
    (result,) = header.pop("model-index")[0]["results"]
    assert result == {
        "task": {"type": "image-classification"},
        "dataset": {"name": "digits", "type": "digits"},
        "metrics": [{"type": "accuracy", "name": "accuracy", "value": 97.54}],
    }
    assert header == {
        "library_name": "activemlp_jax",
        "pipeline_tag": "image-classification",
        "tags": [*("activemlp", "active-token-mixer", "jax", "flax"), "stablehlo", "safetensors"],
        "metrics": ["accuracy"],
    }


def test_the_readme_claims_nothing_where_nothing_is_known(tmp_path: Path, config: dict[str, Any]):
    text, header = readme(tmp_path, config, {})
    assert "## Where the weights come from\n\nNot said." in text
    assert "## Quality\n\nNot measured." in text
    assert {"metrics", "model-index"}.isdisjoint(header)


@settings(max_examples=25, deadline=None)
@given(name=st.text())
def test_any_name_of_a_data_set_fits_into_the_readme(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], name: str
):
    source = {"trained_on": name, "test_accuracy": 50}
    text, header = readme(tmp_path_factory.getbasetemp(), config, source)
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"]["name"] == one_line(name)
    assert text.count("\n## ") == 6


@pytest.mark.parametrize(
    ("source", "condition"),
    [
        ({}, ""),
        ({"trained_on": "digits"}, " It depends on the data, `digits`."),
        (
            {"trained_on": "folder:pets", "init_from": "models/tiny"},
            " It depends on the data, `folder:pets` and the weights that training started from, "
            "`models/tiny`.",
        ),
        ({"file": "a.pth"}, " It depends on the file that they were converted from, `a.pth`."),
    ],
)
def test_no_license_is_claimed_for_the_weights(
    source: dict[str, Any], condition: str, tmp_path: Path, config: dict[str, Any]
):
    text, header = readme(tmp_path, config, source)
    assert "license" not in header
    assert f"is for those to say who made them.{condition} Before you publish" in text

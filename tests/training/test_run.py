"""The model directory and the model card of a run describe its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console
from small_models import BACKBONE, save_classifier

import activemlp_jax as am
from activemlp_jax.export.__main__ import describe, export_model
from activemlp_jax.export.readme import write_readme
from activemlp_jax.training.config import default_config
from activemlp_jax.training.loop import train
from activemlp_jax.training.results import describe_source, write_model_directory
from activemlp_jax.training.trainer import Run, prepare_run
from activemlp_jax.training.workdir import EPOCHS_FILE, STEPS_FILE, append_record, claim_workdir
from activemlp_jax.utils.digests import DIGESTS
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.model_card import ModelCard


def prepared(workdir: Path, config_name: str = "digits", **changes: Any) -> Run:
    """Prepare a run of a micro model on the 1,437 training digits, with 11 steps per epoch."""
    config = default_config()
    config.model.update(BACKBONE | {"mlp_ratios": (2.0,) * 4})
    config.update_from_flattened_dict({"epochs": 40, **changes})
    return prepare_run(config, workdir, config_name)


def train_again(run: Run) -> None:
    train(run.config, run.workdir, Console(quiet=True))


def test_records_without_checkpoints_are_no_beginning_and_stay(tmp_path: Path):
    """Checkpoints can be missing because their disk is not mounted."""
    run = prepared(tmp_path / "run")
    with claim_workdir(run.workdir, run.config):
        for step in (11, 22):
            append_record(run.workdir / EPOCHS_FILE, {"epoch": step // 11, "step": step})
            append_record(run.workdir / STEPS_FILE, {"step": step, "loss": 0.5})
    names = (EPOCHS_FILE, STEPS_FILE)
    records = {name: (run.workdir / name).read_bytes() for name in names}
    with pytest.raises(UserError, match=r"has lost its checkpoints; is its disk mounted\?"):
        train_again(run)
    assert {name: (run.workdir / name).read_bytes() for name in names} == records


@pytest.mark.parametrize("name", [EPOCHS_FILE, STEPS_FILE])
def test_a_broken_record_is_named_before_anything_is_forgotten(name: str, tmp_path: Path):
    run = prepared(tmp_path / "run")
    with claim_workdir(run.workdir, run.config):
        good = '{"epoch": 1, "step": 11}\n'
        (run.workdir / name).write_text(f'{good}{{"epoch"\n{good}')
    before = (run.workdir / name).read_bytes()
    with pytest.raises(UserError, match=f"{name}, line 2 is not readable as JSON"):
        train_again(run)
    assert (run.workdir / name).read_bytes() == before


def readme(run: Run, source: dict[str, Any]) -> str:
    """Return the model card of exported weights with this `source`."""
    task, variables = run.trainer.task, run.trainer.state.variables
    card = ModelCard(task.model, task.preprocessing, ("ema",), "ema", run.class_names, source)
    run.workdir.mkdir(exist_ok=True)
    write_readme(run.workdir / "README.md", card, describe(card, variables))
    return (run.workdir / "README.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return the text under a heading."""
    return text.split(f"\n## {heading}\n\n")[1].split("\n\n## ")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Prepare a run that starts from the weights of another model."""
    place = tmp_path_factory.mktemp("runs")
    return prepared(place / "run", init_from=str(save_classifier(place / "letters")))


@pytest.fixture(scope="module")
def directory(run: Run) -> Path:
    """Write the model directory of the run's last step, with weights of a golden run."""
    variables = jax.tree.map(np.asarray, goldens.rule_variables(run.trainer.model))
    state = run.trainer.first_state(variables).replace(step=jnp.asarray(run.trainer.steps))
    write_model_directory(run, "model", state, 97.5)
    return run.workdir / "model"


def test_a_model_directory_says_what_its_weights_learnt_from_and_were_measured_on(
    run: Run, directory: Path
):
    assert json.loads((directory / "model.json").read_text())["source"] == {
        "trained_on": "digits",
        "train_images": 1437,
        "epoch": 40,
        "step": 440,
        "test_accuracy": 97.5,
        "test_images": 360,
        "test_split": "test",
        "config": "digits",
        "epochs": 40,
        "init_from": run.config.init_from,
    }


def test_the_exported_card_names_recipe_measurement_license_and_citation(
    run: Run, directory: Path, tmp_path: Path
):
    export_model(str(directory), str(tmp_path / "exported"), ["safetensors"])
    text = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    start = run.config.init_from
    recipe, table = section(text, "Where the weights come from").split("\n\n")
    assert recipe == (
        "Trained by the config `digits` on 1,437 images of `digits` for 40 epochs, from the "
        f"weights in `{start}`."
    )
    assert "| `test_images` | `360` |" in table
    assert section(text, "Quality") == (
        "accuracy 97.50% on the 360 test images of `digits`, measured after 40 epochs."
    )
    license_text = section(text, "License")
    assert license_text.startswith("The code that wrote these files is Apache-2.0.")
    assert (
        f"the data, `digits` and the weights that training started from, `{start}`" in license_text
    )
    assert "title     = {Active Token Mixer}" in section(text, "Citation")
    (result,) = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}


def test_the_card_of_the_best_weights_says_that_they_are_not_the_last(run: Run):
    text = readme(run, describe_source(run, 28 * 11, 97.78))
    assert "for 28 of 40 epochs" in section(text, "Where the weights come from")
    assert section(text, "Quality") == (
        "accuracy 97.78% on the 360 test images of `digits`, measured after 28 of 40 epochs."
    )


@pytest.mark.parametrize(("step", "length"), [(25, "25 steps"), (22, "22 of 25 steps")])
def test_a_run_by_steps_from_scratch_says_so(step: int, length: str, tmp_path: Path):
    run = prepared(tmp_path / "run", config_name="", steps=25)
    source = describe_source(run, step, 50.0)
    assert {"config", "epochs", "init_from"}.isdisjoint(source)
    text = readme(run, source)
    recipe, _ = section(text, "Where the weights come from").split("\n\n")
    assert recipe == f"Trained on 1,437 images of `digits` for {length}, from random weights."
    assert section(text, "Quality").endswith(f"measured after {length}.")


@pytest.mark.parametrize("key", ["train_images", "test_images", "test_split", "epochs", "step"])
def test_any_key_but_the_data_may_be_missing(run: Run, key: str):
    source = {name: value for name, value in describe_source(run, 440, 97.5).items() if name != key}
    assert "accuracy 97.50% on the" in section(readme(run, source), "Quality")


def test_a_directory_of_an_earlier_version_is_loaded_and_exported(directory: Path, tmp_path: Path):
    """Directories of earlier versions have a source of three keys, and no digests."""
    old = shutil.copytree(directory, tmp_path / "old")
    content = json.loads((old / "model.json").read_text())
    kept = ("trained_on", "epoch", "test_accuracy")
    content["source"] = {key: content["source"][key] for key in kept}
    (old / "model.json").write_text(json.dumps(content))
    (old / DIGESTS).unlink()

    export_model(str(old), str(tmp_path / "exported"), ["safetensors"])
    text = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert section(text, "Quality") == (
        "accuracy 97.50% on the test images of `digits`, measured as training ended."
    )
    assert "Trained" not in section(text, "Where the weights come from")
    _, variables = am.load_pretrained(old)
    jax.tree.map(np.testing.assert_array_equal, variables, am.load_pretrained(directory)[1])

"""Runs of `train.py` with the original's whole recipe, from image files to a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import encoded, photo, save_odd_images, save_photos
from rich.console import Console
from small_models import save_classifier

import activemlp_jax as am
from activemlp_jax.data.preparation import prepare_folder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("recipe")

# A model that trains in seconds, instead of the config's model.
SMALL = (
    "--config.model.depths=(2,2,2,2)",
    "--config.model.embed_dims=(8,8,16,16)",
    "--config.model.mlp_ratios=(2.0,2.0,2.0,2.0)",
    "--config.model.dtype=float32",
    "--config.data.image_size=32",
    "--config.data.num_threads=2",
)
# Runs with these options, two classes and eight or nine images share one compiled program.
FINE_TUNING = (
    *("--config", "configs/fine_tune_folder.py", *SMALL),
    *("--config.batch_size=4", "--config.eval_batch_size=9", "--config.epochs=3"),
)


def train(*arguments: str, data_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if data_dir:
        environment["TFDS_DATA_DIR"] = str(data_dir)
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare `tiny_imagenet` with 80 training and 8 validation photos; return TFDS_DATA_DIR."""
    folder = tmp_path_factory.mktemp("tiny")
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    save_photos(folder / "photos" / "train", wnids, 20, (250, 187))
    save_photos(folder / "photos" / "validation", wnids, 2, (187, 250))
    prepare_folder(folder / "photos", "tiny_imagenet", folder / "data", 2, Console(quiet=True))
    return folder / "data"


@pytest.mark.slow
def test_twenty_steps_of_the_whole_recipe(tiny_imagenet: Path, tmp_path: Path):
    """Everything except the dataset and the sizes is as in configs/active_xtiny.py."""
    result = train(
        *("--config", "configs/active_xtiny.py", *SMALL, "--workdir", str(tmp_path / "run")),
        *("--config.data.name=tfds:tiny_imagenet", "--config.epochs=1"),
        *("--config.batch_size=4", "--config.eval_batch_size=4"),
        data_dir=tiny_imagenet,
    )
    assert result.returncode == 0, result.stderr
    assert "80 images to train, 8 to test" in result.stdout
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert record["step"] == 20
    assert record["learning_rate"] == pytest.approx(1e-6)
    assert record["images_skipped"] == 0
    assert 1.0 < record["train_loss"] < 2.5, "about log(4), the loss of knowing nothing"
    model, _ = am.load_pretrained(tmp_path / "run" / "model")
    assert model.depths == (2, 2, 2, 2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["drop_path_rate"] == 0.1
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert "n01440764" in json.dumps(card), "class names are kept"


@pytest.mark.slow
def test_own_photos_of_every_kind_are_fine_tuned_on(tmp_path: Path):
    """A folder of photos, and configs/fine_tune_folder.py with its options."""
    for split in ("train", "val"):
        save_odd_images(tmp_path / "photos" / split)
    arguments = (
        *(*FINE_TUNING, f"--config.data.name=folder:{tmp_path / 'photos'}"),
        f"--config.init_from={save_classifier(tmp_path / 'start')}",
        *("--workdir", str(tmp_path / "run")),
    )
    first = train(*arguments)
    assert first.returncode == 0, first.stderr
    assert "starting from the model weights" in first.stdout
    again = train(*arguments)
    assert "steps are done" in again.stdout, again.stderr
    assert "starting from" not in again.stdout, "a resumed run has its own weights"


@pytest.mark.slow
def test_broken_images_are_named_counted_and_recorded(tmp_path: Path):
    """An epoch has all eight images."""
    save_photos(tmp_path / "train", ["a", "b"], 4, (40, 40))
    save_photos(tmp_path / "val", ["a", "b"], 2, (40, 40))
    broken = tmp_path / "train" / "b" / "002.JPEG"
    broken.write_bytes(encoded(photo(0, 40, 40))[:400])
    arguments = (*FINE_TUNING, f"--config.data.name=folder:{tmp_path}")
    skipping = train(
        *arguments, "--config.data.on_error=skip", "--workdir", str(tmp_path / "skipping")
    )
    assert skipping.returncode == 0, skipping.stderr
    assert skipping.stdout.count(f"skipped: {broken} is not a readable image") == 1
    lines = (tmp_path / "skipping" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_skipped"] for line in lines] == [1, 1, 1]

    stopped = train(
        *arguments,
        *("--config.data.on_error=skip", "--config.data.max_skipped=0"),
        *("--workdir", str(tmp_path / "stopped")),
    )
    assert stopped.returncode == 2, stopped.stdout
    assert f"{broken} is not a readable image" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1, stopped.stderr


@pytest.mark.slow
def test_a_data_set_that_is_missing_is_told_how_to_prepare(tmp_path: Path):
    result = train(
        *("--config", "configs/active_tiny.py", "--workdir", str(tmp_path / "run")),
        data_dir=tmp_path,
    )
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "python -m activemlp_jax.prepare_data imagenet2012 FOLDER" in result.stderr
    assert not (tmp_path / "run").exists()

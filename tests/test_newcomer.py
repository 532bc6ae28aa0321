"""A newcomer's first hour: train, ask, embed, export, convert, open the notebook.

The real commands, but for the time that LLVM takes to optimise.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import COMPILE_QUICKLY
from small_models import run
from test_train_command import ROOT, SMALL

import activemlp_jax as am
from activemlp_jax import predict
from activemlp_jax.data.sources import open_source
from activemlp_jax.weights import convert

# One process with test_train_command: whichever comes second finds the compiled programs in
# JAX's cache.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]

NOTEBOOK = ROOT / "examples" / "activemlp.ipynb"

# Runs the cells of a notebook one after the other, and shows the last value of each as Jupyter
# would: as a picture where it is one.
RUN_NOTEBOOK = """
import ast, json, sys
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        *statements, last = ast.parse("".join(cell["source"])).body
        shows = isinstance(last, ast.Expr)
        rest = statements if shows else [*statements, last]
        exec(compile(ast.Module(rest, []), cell["id"], "exec"), names)
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names) if shows else 0
        is_picture = hasattr(value, "_repr_png_")
        print(f"picture {value.size} {len(value._repr_png_())}" if is_picture else repr(value))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of `train.py` in runs/digits, and ten test digits in digits/."""
    place = tmp_path_factory.mktemp("newcomer")
    command(place, str(ROOT / "train.py"), "--workdir=runs/digits", *SMALL)
    (place / "digits").mkdir()
    digits = open_source("digits", "test")
    for index in range(10):
        Image.fromarray(digits[index].image).save(place / "digits" / f"{index}.png")
    return place


def command(place: Path, *arguments: str, **variables: str) -> str:
    """What a command prints that ends well."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=place, env={**os.environ, **COMPILE_QUICKLY, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def answers(output: str) -> dict[str, str]:
    """By the name of the image, the most probable class of each line of JSON."""
    records = map(json.loads, output.splitlines())
    return {record["image"]: record["classes"][0]["name"] for record in records}


def test_what_was_trained_is_asked_embedded_and_exported(place: Path):
    model = "runs/digits/model"
    found = answers(command(place, "-m", "activemlp_jax.predict", model, "digits", "--json"))
    assert list(found) == [f"digits/{index}.png" for index in range(10)]
    card, loaded = am.read_card(place / model), am.load_pretrained(place / model)
    (ours,) = am.classify(*loaded, place / "digits" / "0.png", card, top=1)
    assert found["digits/0.png"] == ours.name

    command(place, "-m", "activemlp_jax.embed", model, "digits", "--output", "digits.npz")
    with np.load(place / "digits.npz") as arrays:
        assert list(arrays["names"]) == [f"{index}.png" for index in range(10)]
        assert arrays["embeddings"].shape == (10, 16)

    command(place, "-m", "activemlp_jax.export", model, "exported")
    names = {file.name for file in (place / "exported").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "model.stablehlo"}
    text = (place / "exported" / "README.md").read_text()
    recipe = "Trained by the config `digits` on 1,437 images of `digits` for 4 epochs"
    assert recipe in text
    assert "on the 360 test images of `digits`, measured after 4 epochs." in text


def test_a_checkpoint_of_the_original_is_converted_and_asked(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(place)
    checkpoint = ROOT / "tests" / "data" / "micro_checkpoint.pth"
    monkeypatch.setattr(sys, "argv", ["convert", str(checkpoint), "models/micro"])
    convert.main()
    assert "wrote models/micro" in capsys.readouterr().out
    assert run(predict.main, monkeypatch, "models/micro", "digits/7.png", "--json") == 0
    (name,) = answers(capsys.readouterr().out).values()
    assert name in set("0123456789")


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_kept_without_results():
    for cell in cells():
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_the_notebook_runs_and_shows_pictures(place: Path):
    output = command(
        NOTEBOOK.parent, "-c", RUN_NOTEBOOK, str(NOTEBOOK),
        MODEL_DIR=str(place / "runs" / "digits" / "model"),
    )  # fmt: skip
    pictures = [line for line in output.splitlines() if line.startswith("picture")]
    assert len(pictures) == 3, output
    assert "[(12, 8, 8, 8), (12, 4, 4, 8), (12, 2, 2, 16), (12, 1, 1, 16)]" in output

"""The real `convert_torch_weights.py` as a process: both directions, and files that it rejects."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import jax
import numpy as np
import pytest
import torch
from commands import error_line, run_main
from processes import ROOT

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.utils.digests import sha256
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights.convert import main
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, write_model

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("convert")
MICRO_CHECKPOINT = goldens.DATA / "micro_checkpoint.pth"


# Runs the command, then prints the process's peak resident memory in KiB. (The resource module
# would include the memory of the parent process.)
PEAK_OF_CONVERSION = """
import re, runpy
runpy.run_path("convert_torch_weights.py", run_name="__main__")
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def run_here(*arguments: object) -> str:
    """Run the command in this process, which is faster, and return its output."""
    result = run_main(main, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def original() -> dict[str, dict[str, torch.Tensor]]:
    """Read the two state dicts of the micro checkpoint with PyTorch."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(MICRO_CHECKPOINT, weights_only=True)
    return {key: content[key] for key in ("model", "model_ema")}


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), key


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Convert the micro checkpoint; return the model directory and the output."""
    directory = tmp_path_factory.mktemp("models") / "micro"
    command = [sys.executable, "convert_torch_weights.py", MICRO_CHECKPOINT, directory, "--verify"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    return directory, result.stdout


def test_conversion_prints_what_it_found(micro: tuple[Path, str]):
    directory, output = micro
    for part in (
        "depths (2, 3, 4, 2), 69,162 parameters, 10 classes",
        "averaged (EMA) and raw, float32; epoch 3",
        "  images:  64 pixels\n",
        f"wrote {directory}; the averaged (EMA) weights are its default",
    ):
        assert part in output
    verified = [line for line in output.splitlines() if line.startswith("verified")]
    assert len(verified) == 2
    for line in verified:
        difference = float(line.split("differ by ")[1].split()[0])
        assert 0 < difference < 1e-12, line


def test_the_directory_says_where_its_weights_come_from(micro: tuple[Path, str]):
    card = json.loads((micro[0] / "model.json").read_text())
    assert card["source"] == {
        "file": "micro_checkpoint.pth",
        "sha256": "0e477715f6055423b83d793183319ba7a76b602c059527b3a6435d405ec79022",
        "epoch": 3,
    }
    assert card["preprocessing"]["image_size"] == 64
    assert card["weights"] == {"kinds": ["ema", "model"], "default": "ema"}


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_converted_weights_give_the_originals_logits(micro: tuple[Path, str], kind: str):
    model, variables = am.load_pretrained(micro[0], kind)
    images = goldens.golden_input("micro_checkpoint_golden.npz", "input").astype(np.float32)
    golden = goldens.load("micro_checkpoint_golden.npz")[f"logits_{kind}"]
    goldens.assert_close(jax.jit(model.apply)(variables, images), golden, 1e-5, kind)


def test_the_weights_asked_for_become_the_default(micro: tuple[Path, str], tmp_path: Path):
    output = run_here(MICRO_CHECKPOINT, tmp_path / "raw", "--weights", "model")
    assert "the raw weights are its default" in output
    _, ours = am.load_pretrained(tmp_path / "raw")
    _, raw = am.load_pretrained(micro[0], "model")
    jax.tree.map(np.testing.assert_array_equal, ours, raw)


def test_weights_go_back_to_pytorch_bit_for_bit(micro: tuple[Path, str], tmp_path: Path):
    output = run_here(micro[0], tmp_path / "back.pth", "--to-torch")
    assert "wrote the averaged (EMA) and raw weights to" in output
    back, expected = torch.load(tmp_path / "back.pth", weights_only=True), original()
    assert set(back) == {*expected, "activemlp_jax"}
    for key, state_dict in expected.items():
        assert_equal(back[key], state_dict)

    run_here(micro[0], tmp_path / "ema.pth", "--to-torch", "--weights", "ema")
    back = torch.load(tmp_path / "ema.pth", weights_only=True)
    assert set(back) == {"model", "activemlp_jax"}
    assert_equal(back["model"], expected["model_ema"])


def test_safetensors_go_both_ways(micro: tuple[Path, str], tmp_path: Path):
    path = tmp_path / "micro.safetensors"
    run_here(micro[0], path, "--to-torch")
    output = run_here(path, tmp_path / "again")
    assert "weights: averaged (EMA), float32; epoch 3" in output
    _, ours = am.load_pretrained(tmp_path / "again")
    _, expected = am.load_pretrained(micro[0])
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("kind", ["ema", "model"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_weights_are_and_where_they_come_from_is_known_after_the_way_back(
    suffix: str, kind: str, micro: tuple[Path, str], tmp_path: Path
):
    path = tmp_path / f"micro{suffix}"
    run_here(micro[0], path, "--to-torch", "--weights", kind)
    output = run_here(path, tmp_path / "again")
    card, digest = read_card(tmp_path / "again"), sha256(path)
    assert output.startswith(f"{path}: SHA-256 {digest}\n")
    assert (card.kinds, card.default_kind) == ((kind,), kind)
    assert card.source == {
        **read_card(micro[0]).source,
        "copied_from": path.name,
        "copied_from_sha256": digest,
    }
    _, ours = am.load_pretrained(tmp_path / "again", kind)
    _, expected = am.load_pretrained(micro[0], kind)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_file_with_both_kinds_gives_both_back(micro: tuple[Path, str], tmp_path: Path):
    run_here(micro[0], tmp_path / "both.pth", "--to-torch")
    run_here(tmp_path / "both.pth", tmp_path / "again")
    assert read_card(tmp_path / "again").kinds == ("ema", "model")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_state_dict_cannot_say_survives_the_way_there_and_back(suffix: str, tmp_path: Path):
    model, variables = am.ActiveMLP(**goldens.MICRO), am.load_torch_checkpoint(MICRO_CHECKPOINT)
    preprocessing = Preprocessing(48, 1.25, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    card = ModelCard(model, preprocessing, ("model",), "model", tuple("abcdefghij"))
    with write_directory_aside(tmp_path / "there") as place:
        write_model(place, card, {"model": variables})
    run_here(tmp_path / "there", tmp_path / f"file{suffix}", "--to-torch")
    run_here(tmp_path / f"file{suffix}", tmp_path / "back")
    back = read_card(tmp_path / "back")
    assert back.preprocessing == preprocessing
    assert back.class_names == card.class_names
    run_here(tmp_path / f"file{suffix}", tmp_path / "larger", "--image-size", "96")
    assert read_card(tmp_path / "larger").preprocessing == dataclasses.replace(
        preprocessing, image_size=96
    )


def test_a_published_variant_is_recognized_and_checked(tmp_path: Path):
    shapes = goldens.official_shapes("active_xtiny")
    weights = {key: torch.full(shape, 0.01) for key, shape in shapes.items()}
    torch.save({"state_dict": weights}, tmp_path / "xtiny.pth")
    output = run_here(
        tmp_path / "xtiny.pth", tmp_path / "xtiny", "--model", "active_xtiny",
        "--num-classes", "1000",
    )  # fmt: skip
    assert "active_xtiny, 15,349,128 parameters, 1000 classes" in output
    assert json.loads((tmp_path / "xtiny" / "model.json").read_text())["name"] == "active_xtiny"


def test_names_from_a_file_reach_the_terminal_without_their_escapes(tmp_path: Path):
    names = ("\x1b[31mred", "two\nlines", *"cdefghij")
    torch.save({"meta": {"CLASSES": names}, "state_dict": state_dict()}, tmp_path / "named.pth")
    output = run_here(tmp_path / "named.pth", tmp_path / "named")
    assert "10 classes (?[31mred, two lines, c and 7 more)" in output
    assert "\x1b" not in output
    assert read_card(tmp_path / "named").class_names == names


@pytest.mark.slow
def test_a_large_checkpoint_of_training_needs_less_than_four_gigabytes(tmp_path: Path):
    shapes = goldens.official_shapes("active_large")
    torch.save(
        {
            "model": {key: torch.randn(shape) for key, shape in shapes.items()},
            "model_ema": {key: torch.randn(shape) for key, shape in shapes.items()},
            "optimizer": {
                "state": {
                    key: {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
                    for key, shape in shapes.items()
                }
            },
            "epoch": 299,
        },
        tmp_path / "large.pth",
    )
    assert (tmp_path / "large.pth").stat().st_size > 1.2e9
    result = subprocess.run(
        [sys.executable, "-c", PEAK_OF_CONVERSION, tmp_path / "large.pth", tmp_path / "large"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    gigabytes = int(result.stdout.splitlines()[-1]) * 1024 / 1e9
    assert 0.9 < gigabytes < 4, f"{gigabytes:.2f} GB"


def state_dict(**changes: Any) -> dict[str, Any]:
    """Return the micro checkpoint's raw weights with `changes`; None removes a key."""
    weights = {**original()["model"], **{k.replace("__", "."): v for k, v in changes.items()}}
    return {key: value for key, value in weights.items() if value is not None}


class RunsCommand:
    """An object whose pickle runs a command on loading, which makes the file `proof`."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


BROKEN: dict[str, tuple[Any, str]] = {
    "a truncated zip": (MICRO_CHECKPOINT.read_bytes()[:900_000], "or is broken or truncated"),
    "another architecture": (
        {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)},
        "misses blocks.0.0.norm1.weight, which every such model has; found conv1.weight",
    ),
    "one missing key": (state_dict(norm__weight=None), "keys 1 missing (norm.weight)"),
    "NaN in the average only": (
        {"model": state_dict(), "model_ema": state_dict(head__bias=torch.full((10,), torch.nan))},
        "ema: head.bias has 10 of 10 values not finite",
    ),
    "averages of another model": (
        {"model": state_dict(head__bias=torch.zeros(7)), "model_ema": state_dict()},
        "head.bias has shape (7,), the model expects (10,)",
    ),
    "a broken description": (
        {"model": state_dict(), "activemlp_jax": "{}"},
        "has a broken description of its model: it has no format, task",
    ),
    "a description whose source is no dict": (
        {
            "model": state_dict(),
            "activemlp_jax": json.dumps(
                ModelCard(
                    am.ActiveMLP(**goldens.MICRO), Preprocessing(), ("model",), "model"
                ).to_json()
                | {"source": "the web"}
            ),
        },
        "has a broken description of its model: source is 'the web', expected an object",
    ),
    "a description that is no JSON": (
        {"model": state_dict(), "activemlp_jax": "{"},
        "has a broken description of its model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_converted_is_one_clear_line(case: str, tmp_path: Path):
    content, message = BROKEN[case]
    path = tmp_path / "broken.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    line = error_line(main, path, tmp_path / "models" / "out")
    assert "broken.pth" in line
    assert message in line
    assert [file.name for file in tmp_path.iterdir()] == ["broken.pth"], "nothing is left behind"


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path):
    path, proof = tmp_path / "given.pth", tmp_path / "it_ran"
    torch.save({"model": state_dict(), "args": RunsCommand(proof)}, path)
    line = error_line(main, path, tmp_path / "out")
    assert "needs posix.system to be read, and only tensors and argparse.Namespace are" in line
    assert not proof.exists(), "the command was run"
    assert [file.name for file in tmp_path.iterdir()] == ["given.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MICRO_CHECKPOINT, "OUT", "--num-classes", "7"], "the model expects (7,)"),
        ([MICRO_CHECKPOINT, "OUT", "--num-classes", "0"], "num_classes is 0"),
        (
            [MICRO_CHECKPOINT, "OUT", "--num-classes", 10**12],
            "is 1000000000000, expected 1 to 1,0",
        ),
        (
            [MICRO_CHECKPOINT, "OUT", "--model", "active_tiny"],
            "the weights are of an ActiveMLP of no published variant (depths (2, 3, 4, 2), "
            "embed_dims (8, 16, 24, 32)), expected active_tiny (depths (2, 3, 10, 3), ",
        ),
        ([MICRO_CHECKPOINT, "OUT", "--image-size", "8"], "image_size is 8, expected at least 32"),
        ([MICRO_CHECKPOINT, "OUT", "--image-size", 10**9], "image_size is 1000000000, expected"),
        ([MICRO_CHECKPOINT, "OUT", "--weights", "average"], "invalid choice: 'average'"),
        ([MICRO_CHECKPOINT, "."], ". is already there; give another place"),
        (["nothing.pth", "OUT"], "there is no file nothing.pth"),
        ([".", "OUT"], ". is a folder, expected a .pth or .safetensors file"),
        (["MODEL", "OUT"], "is a model directory, expected a file; --to-torch converts it back"),
        (["MODEL", "OUT", "--to-torch"], "out, expected a name that ends in .pth or .pt or .safet"),
        (["MODEL", "OUT.bin", "--to-torch"], "OUT is OUT.bin, expected a name that ends in .pth"),
        ([MICRO_CHECKPOINT, "OUT.pth", "--to-torch"], "is not a model directory: it is a file"),
        ([MICRO_CHECKPOINT, f"{MICRO_CHECKPOINT}/out"], "micro_checkpoint.pth is not a folder"),
        ([".", "OUT", "--to-torch", "--verify"], "--verify does not go with --to-torch"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(
    arguments: list[Any], message: str, micro: tuple[Path, str], tmp_path: Path
):
    places = {"OUT": tmp_path / "out", "MODEL": micro[0]}
    line = error_line(main, *(places.get(argument, argument) for argument in arguments))
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors"])
def test_a_place_that_cannot_be_written_is_one_clear_line(suffix: str, micro: tuple[Path, str]):
    out = f"/proc/cannot{suffix}"
    arguments = (micro[0], out, "--to-torch") if suffix else (MICRO_CHECKPOINT, out)
    result = run_main(main, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "/proc/" in line
    assert "No such file or directory" in line

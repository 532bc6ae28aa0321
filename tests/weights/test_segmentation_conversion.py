"""The real `convert_torch_weights.py` on segmentation checkpoints, in both directions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import jax
import numpy as np
import pytest
import torch
from processes import ROOT

import activemlp_jax as am
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.utils.files import write_directory_aside
from activemlp_jax.weights import verify
from activemlp_jax.weights.convert import main
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_directory import read_card, write_model

MICRO_CHECKPOINT = goldens.DATA / "seg_micro_upernet_checkpoint.pth"
CLASSIFIER = goldens.DATA / "micro_checkpoint.pth"

# Run these tests in one process, so that they share slow fixtures.
pytestmark = pytest.mark.xdist_group("convert segmentation")


def original() -> dict[str, torch.Tensor]:
    return torch.load(MICRO_CHECKPOINT, weights_only=True)["state_dict"]


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(ours[key], value), key


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command in this process and returns its output."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_torch_weights.py", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuse(convert: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command, which must fail, and returns its error line."""

    def run(*arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            convert(*arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run


@pytest.fixture(scope="module")
def upernet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Convert the micro checkpoint in a process; return the model directory and the output."""
    directory = tmp_path_factory.mktemp("models") / "upernet"
    command = [sys.executable, "convert_torch_weights.py", MICRO_CHECKPOINT, directory, "--verify"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    return directory, result.stdout


def write_fpn(directory: Path, kinds: tuple[str, ...], **fields: Any) -> Path:
    """Write a model directory of the micro Semantic FPN; the weights of each kind differ."""
    model = am.ActiveSegmentor(**goldens.SEG_MICRO["fpn"])
    weights = {
        kind: jax.tree.map(np.asarray, goldens.rule_variables(model, seed))
        for seed, kind in enumerate(kinds)
    }
    card = ModelCard(model, ScenePreprocessing(0, 96, 64), kinds, kinds[0], **fields)
    with write_directory_aside(directory) as place:
        write_model(place, card, weights)
    return directory


def test_conversion_prints_what_it_found(upernet: tuple[Path, str]):
    directory, output = upernet
    for part in (
        "depths (2, 3, 4, 2), under the head 'upernet', 104,006 parameters, 7 classes (a, b, c and",
        "raw, float32; iteration 160000",
        "resized into 2048 x 512 pixels",
        f"wrote {directory}; the raw weights are its default",
    ):
        assert part in output
    (verified,) = (line for line in output.splitlines() if line.startswith("verified"))
    assert 0 < float(verified.split("differ by ")[1].split()[0]) < 1e-12


def test_the_directory_says_all_that_the_file_did(upernet: tuple[Path, str]):
    content = json.loads((upernet[0] / "model.json").read_text())
    assert content["task"] == "segmentation"
    assert content["classes"] == {"number": 7, "names": list("abcdefg")}
    assert content["source"] == {
        "file": "seg_micro_upernet_checkpoint.pth",
        "sha256": "5ef73dc8748b6c0eda7e6974637ec68cefc85049b44d04c1c527b06776260c68",
        "epoch": None,
        "iteration": 160000,
    }
    card = read_card(upernet[0])
    assert card.model == am.ActiveSegmentor(**goldens.SEG_MICRO["upernet"])
    assert card.preprocessing == ScenePreprocessing()


def test_converted_weights_are_the_files(upernet: tuple[Path, str]):
    """The tests of reading the file check that these weights give the original's logits."""
    _, variables = am.load_pretrained(upernet[0])
    jax.tree.map(
        np.testing.assert_array_equal, variables, am.load_torch_checkpoint(MICRO_CHECKPOINT)
    )


def test_weights_go_back_to_mmsegmentation_bit_for_bit(
    upernet: tuple[Path, str], convert: Any, tmp_path: Path
):
    assert "wrote the raw weights to" in convert(upernet[0], tmp_path / "back.pth", "--to-torch")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {"meta", "state_dict", "activemlp_jax"}
    assert back["meta"] == {"CLASSES": tuple("abcdefg")}
    assert_equal(back["state_dict"], original())


def test_one_kind_of_weights_goes_into_a_file(convert: Any, tmp_path: Path):
    directory = write_fpn(tmp_path / "fpn", ("ema", "model"))
    for arguments, kind in (
        ([], "averaged (EMA)"),
        (["--weights", "ema"], "averaged (EMA)"),
        (["--weights", "model"], "raw"),
    ):
        path = tmp_path / "back.pth"
        output = convert(directory, path, "--to-torch", *arguments)
        assert f"wrote the {kind} weights to" in output
        content = torch.load(path, weights_only=True)
        assert content["meta"] == {}, "there are no names"
        _, expected = am.load_pretrained(directory, "model" if kind == "raw" else "ema")
        found = am.from_torch(content["state_dict"])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        path.unlink()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_state_dict_cannot_say_survives_the_way_there_and_back(
    suffix: str, convert: Any, tmp_path: Path
):
    names = ("sky", "tree", "road", "grass", "wall", "car", "door")
    directory = write_fpn(tmp_path / "there", ("model",), class_names=names)
    convert(directory, tmp_path / f"file{suffix}", "--to-torch")
    output = convert(tmp_path / f"file{suffix}", tmp_path / "back")
    assert "under the head 'fpn'" in output
    assert "7 classes (sky, tree, road and 4 more)" in output
    back, there = read_card(tmp_path / "back"), read_card(directory)
    assert back.model == there.model
    assert (back.preprocessing, back.class_names) == (there.preprocessing, names)
    _, ours = am.load_pretrained(tmp_path / "back")
    _, expected = am.load_pretrained(directory)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_names_lose_the_spaces_around_them(tmp_path: Path, convert: Any):
    """One of mmsegmentation's class names for ADE20K ends with a space."""
    names = {"CLASSES": ("bed ", *"bcdefg")}
    torch.save({"meta": names, "state_dict": original()}, tmp_path / "named.pth")
    convert(tmp_path / "named.pth", tmp_path / "out")
    assert read_card(tmp_path / "out").class_names == ("bed", *"bcdefg")


@pytest.mark.parametrize(
    ("meta", "line"),
    [
        ({}, "7 classes\n"),
        ({"CLASSES": ["a", "b"]}, "7 classes; the file names 2, which are left out\n"),
        ({"CLASSES": "abcdefg"}, "7 classes\n"),
        ({"CLASSES": [*"abcdef", 7]}, "7 classes\n"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_left_out(
    meta: Any, line: str, convert: Any, tmp_path: Path
):
    torch.save({"meta": meta, "state_dict": original()}, tmp_path / "named.pth")
    assert line in convert(tmp_path / "named.pth", tmp_path / "out")
    assert read_card(tmp_path / "out").class_names is None


def test_a_published_backbone_is_recognized_and_checked(convert: Any, tmp_path: Path):
    shapes = goldens.load_json("official_seg_keys_ActiveLarge_fpn.json")
    weights = {
        key: torch.tensor(9) if key.endswith("tracked") else torch.zeros(shape)
        for key, shape in shapes.items()
    }
    torch.save({"state_dict": weights}, tmp_path / "fpn.pth")
    arguments = ("--model", "active_large", "--num-classes", "150")
    output = convert(tmp_path / "fpn.pth", tmp_path / "fpn", *arguments)
    count = goldens.load_json("seg_param_counts.json")["ActiveLarge_fpn"]
    assert f"active_large, under the head 'fpn', {count:,} parameters, 150 classes\n" in output
    content = json.loads((tmp_path / "fpn" / "model.json").read_text())
    assert (content["name"], content["classes"]["names"]) == ("active_large", None)


def test_a_difference_between_the_two_writings_stops_the_conversion(
    refuse: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(verify, "largest_difference", lambda *_: {"model": 2e-9})
    line = refuse(MICRO_CHECKPOINT, tmp_path / "out", "--verify")
    assert "differ by 2.0e-09 of the logits, more than 1e-09; nothing was written" in line
    assert list(tmp_path.iterdir()) == []


def test_verification_sees_a_change_of_the_auxiliary_head_alone(upernet: tuple[Path, str]):
    arrays = {key: value.numpy() for key, value in original().items()}
    assert verify.largest_difference(upernet[0], {"model": arrays})["model"] < 1e-12
    arrays["auxiliary_head.conv_seg.bias"] = arrays["auxiliary_head.conv_seg.bias"] * 1.01
    assert 1e-6 < verify.largest_difference(upernet[0], {"model": arrays})["model"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MICRO_CHECKPOINT, "OUT", "--model", "active_tiny"], "depths (2, 3, 10, 3)"),
        ([MICRO_CHECKPOINT, "OUT", "--num-classes", "150"], "the model expects (150,)"),
        ([MICRO_CHECKPOINT, "OUT", "--num-classes", "0"], "num_classes is 0"),
        ([MICRO_CHECKPOINT, "OUT", "--image-size", "512"], "--image-size does not go with a segme"),
        ([MICRO_CHECKPOINT, "OUT", "--weights", "ema"], "has no 'ema' weights, only 'model'"),
        ([CLASSIFIER, "OUT", "--model", "active_large"], "depths (3, 4, 24, 3)"),
    ],
)
def test_a_wrong_command_line_is_said_clearly(
    arguments: list[Any], message: str, refuse: Any, tmp_path: Path
):
    out = tmp_path / "out"
    line = refuse(*[out if argument == "OUT" else argument for argument in arguments])
    assert message in line
    assert list(tmp_path.iterdir()) == []


def broken(**changes: Any) -> dict[str, Any]:
    """Return the checkpoint with changed weights; None removes a key."""
    weights = {**original(), **{key.replace("__", "."): v for key, v in changes.items()}}
    return {"state_dict": {key: value for key, value in weights.items() if value is not None}}


BROKEN: dict[str, tuple[Any, str]] = {
    "a missing statistic": (
        broken(decode_head__psp_modules__2__1__bn__running_mean=None),
        "keys 1 missing (decode_head.psp_modules.2.1.bn.running_mean)",
    ),
    "an unknown key": (broken(backbone__head__bias=torch.zeros(7)), "1 unknown (backbone.head.b"),
    "an integer weight": (
        broken(decode_head__conv_seg__bias=torch.zeros(7, dtype=torch.int64)),
        "decode_head.conv_seg.bias has values of type int64, expected floating",
    ),
    "a head of another width": (
        broken(decode_head__fpn_bottleneck__conv__weight=torch.zeros(24, 64, 3, 3)),
        "fpn_bottleneck.conv.weight has shape (24, 64, 3, 3), the model expects (16, 64, 3, 3)",
    ),
    "another backbone": (
        {"state_dict": {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}},
        "misses backbone.blocks.0.0.norm1.weight, which every such model has; found backbone.conv1",
    ),
    "the description of a classifier": (
        {**broken(), "activemlp_jax": json.dumps(
            ModelCard(am.ActiveMLP(**goldens.MICRO), Preprocessing(),
                      ("model",), "model").to_json())},
        "the description of its model is for another task than its weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_converted_is_one_clear_line(case: str, refuse: Any, tmp_path: Path):
    content, message = BROKEN[case]
    torch.save(content, tmp_path / "broken.pth")
    line = refuse(tmp_path / "broken.pth", tmp_path / "models" / "out")
    assert "broken.pth" in line
    assert message in line
    assert [file.name for file in tmp_path.iterdir()] == ["broken.pth"], "nothing is left behind"

"""Files of PyTorch's world: what is understood, what is refused, and that nothing is run."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import activemlp_jax as am
from activemlp_jax.errors import UserError
from activemlp_jax.weights.torch_files import read_checkpoint, write_checkpoint

MICRO_CHECKPOINT = goldens.DATA / "micro_checkpoint.pth"


def micro_state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = goldens.torch_shapes(am.ActiveMLP(**goldens.MICRO))
    arrays = goldens.rule_state_dict(shapes, seed)
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in arrays.items()}


def assert_holds(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], value.numpy(), err_msg=key)


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_the_originals_checkpoint_gives_the_originals_logits(kind: str):
    model = am.ActiveMLP(**goldens.MICRO)
    variables = am.load_torch_checkpoint(MICRO_CHECKPOINT, weights=kind)
    images = goldens.golden_input("micro_checkpoint_golden.npz", "input").astype(np.float32)
    logits = jax.jit(model.apply)(variables, images)
    golden = goldens.load("micro_checkpoint_golden.npz")[f"logits_{kind}"]
    goldens.assert_close(logits, golden, 1e-5, kind)


def test_the_average_is_taken_where_there_is_one():
    auto, ema, model = (am.load_torch_checkpoint(MICRO_CHECKPOINT, w) for w in
                        ("auto", "ema", "model"))  # fmt: skip
    kernels = [tree["params"]["head"]["kernel"] for tree in (auto, ema, model)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).any()


def test_a_full_checkpoint_says_its_epoch_and_image_size():
    checkpoint = read_checkpoint(MICRO_CHECKPOINT)
    assert (checkpoint.epoch, checkpoint.image_size) == (3, 64)
    assert list(checkpoint.weights) == ["ema", "model"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "model_ema": None, "epoch": 7},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["bare", "state_dict", "model", "data-parallel", "model, data-parallel"],
)
def test_every_form_of_a_state_dict_is_understood(wrap: Any, legacy: bool, tmp_path: Path):
    weights = micro_state_dict()
    path = tmp_path / "weights.pth"
    torch.save(wrap(weights), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert list(checkpoint.weights) == ["model"]
    assert_holds(checkpoint.weights["model"], weights)


def test_safetensors_are_read_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = micro_state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({key: value.numpy() for key, value in weights.items()}, path)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert_holds(read_checkpoint(path).weights["model"], weights)
    with pytest.raises(UserError, match=r"needs PyTorch: pip install -c .*'\.\[torch\]', or"):
        read_checkpoint(MICRO_CHECKPOINT)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_back_bit_for_bit(suffix: str, dtype: str, tmp_path: Path):
    weights = {
        key: value.numpy().astype(jnp.dtype(dtype)) for key, value in micro_state_dict().items()
    }
    path = tmp_path / f"weights{suffix}"
    write_checkpoint(path, {"model": weights}, {"format": 1})
    checkpoint = read_checkpoint(path)
    assert checkpoint.description == {"format": 1}
    found = checkpoint.weights["model"]
    assert set(found) == set(weights)
    for key, value in weights.items():
        assert found[key].dtype == value.dtype
        assert found[key].tobytes() == value.tobytes(), key
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["ema"], "ema"), (["model"], "model"), (["ema", "model"], "model"), (["best"], "model"),
     ([["ema"]], "model"), (None, "model")],
)  # fmt: skip
def test_one_set_of_weights_is_what_the_description_says(
    kinds: Any, expected: str, suffix: str, tmp_path: Path
):
    arrays = {key: value.numpy() for key, value in micro_state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    write_checkpoint(path, {"model": arrays}, {"weights": {"kinds": kinds}})
    assert list(read_checkpoint(path).weights) == [expected]


def test_pytorch_reads_what_is_written_for_it(tmp_path: Path):
    average, raw = micro_state_dict(1), micro_state_dict(2)
    path = tmp_path / "weights.pth"
    arrays = {
        kind: {key: value.numpy() for key, value in weights.items()}
        for kind, weights in (("ema", average), ("model", raw))
    }
    write_checkpoint(path, arrays, {})
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "model_ema", "activemlp_jax"}
    for key in raw:
        assert torch.equal(content["model"][key], raw[key])
        assert torch.equal(content["model_ema"][key], average[key])


class RunsCommand:
    """A pickle that runs `command` where it is loaded without care."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "before PyTorch 1.6", "pickle"])
def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(form: str, tmp_path: Path):
    proof, path = tmp_path / "it_ran", tmp_path / "hostile.pth"
    content = {"model": micro_state_dict(), "args": RunsCommand(f"touch {proof}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"hostile\.pth needs posix\.system to be read") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not proof.exists(), "the command was run"

    if form == "pickle":  # the file is a live one: this is what it does to the careless
        pickle.loads(path.read_bytes())
        assert proof.exists()


class Settings:
    """A class of somebody's own."""


@pytest.mark.parametrize("content", [{"args": Settings()}, Settings()], ids=["in a dict", "alone"])
def test_a_class_of_somebodys_own_is_refused_by_name(content: Any, tmp_path: Path):
    path = tmp_path / "own.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"own\.pth needs \S*Settings to be read, and only tensors"):
        read_checkpoint(path)


def test_a_namespace_may_not_smuggle_in_another_class(tmp_path: Path):
    path = tmp_path / "args.pth"
    torch.save({"model": micro_state_dict(), "args": argparse.Namespace(extra=Settings())}, path)
    with pytest.raises(UserError, match=r"needs \S*Settings to be read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "there is no file"),
        (".", None, "is a folder, expected a .pth or .safetensors file"),
        ("empty.pth", b"", "is empty"),
        ("text.pth", b"these are no weights\n", "is no PyTorch checkpoint, or a broken"),
        ("start.pth", b"PK\x03\x04", "is no PyTorch checkpoint, or a broken"),
        ("half.pth", MICRO_CHECKPOINT.read_bytes()[:700_000], "is no PyTorch checkpoint, or a"),
        ("empty.safetensors", b"", "is empty"),
        ("text.safetensors", b"these are no weights\n", "is no readable safetensors file"),
        ("torch.safetensors", MICRO_CHECKPOINT.read_bytes()[:9999], "no readable safetensors"),
    ],
)
def test_a_broken_file_is_one_clear_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def broken(key: str, value: Any) -> dict[str, Any]:
    return {**micro_state_dict(), key: value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"holds a list, expected a dict of weights"),
        ({}, r"holds no weights: .*found nothing"),
        ({"epoch": 3, "optimizer": {}}, r"holds no weights: .*found epoch, optimizer"),
        (broken("norm.weight", torch.full((32,), torch.nan)), r"norm\.weight has 32 of 32 values"),
        (broken("head.bias", torch.full((10,), torch.inf)), r"head\.bias has 10 of 10 values not"),
        (broken("norm.bias", torch.zeros(32, dtype=torch.int64)), r"of type int64, expected float"),
        (
            broken("head.bias", torch.zeros(1).expand(10**13)),
            r"head\.bias has 40000000000000 bytes",
        ),
        ({"model": broken("norm.bias", "big")}, r"'norm\.bias' is a str, expected a named tensor"),
        ({"model": broken("norm.bias", torch.eye(32).to_sparse())}, r"norm\.bias is no dense"),
    ],
)
def test_content_that_is_no_set_of_weights_is_named(content: Any, message: str, tmp_path: Path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"odd\.pth.*{message}") as error:
        read_checkpoint(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_weights_that_a_file_lacks_are_named(tmp_path: Path):
    torch.save(micro_state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth has no 'ema' weights, only 'model'"):
        am.load_torch_checkpoint(tmp_path / "bare.pth", weights="ema")


def test_weights_for_another_model_are_refused():
    model = am.ActiveMLP(**{**goldens.MICRO, "num_classes": 7})
    with pytest.raises(UserError, match=r"micro_checkpoint\.pth: head\.bias has shape \(10,\)"):
        am.load_torch_checkpoint(MICRO_CHECKPOINT, model=model)

"""Reading and writing PyTorch and safetensors files."""

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
from activemlp_jax.utils.errors import UserError
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


def test_files_are_read_without_pytorch_which_only_writing_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = micro_state_dict()
    arrays = {key: value.numpy() for key, value in weights.items()}
    save_file(arrays, tmp_path / "weights.safetensors")
    torch.save(weights, tmp_path / "weights.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    for name in ("weights.safetensors", "weights.pth"):
        assert_holds(read_checkpoint(tmp_path / name).weights["model"], weights)
    with pytest.raises(UserError, match=r"needs PyTorch: pip install -c .*'\.\[torch\]', or"):
        write_checkpoint(tmp_path / "back.pth", {"model": arrays}, {})
    assert not list(tmp_path.glob("*back*"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before PyTorch 1.6"])
def test_what_pytorch_reads_in_a_file_is_what_is_read_of_it(legacy: bool, tmp_path: Path):
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    weights = {
        "transposed": torch.randn(5, 3).t(),
        "slice of a larger one": shared[1:3, 2:5],
        "the larger one": shared,
        "with steps": torch.randn(20)[3::4],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(7, 5).bfloat16().t(),
    }
    weights["with an attribute"] = torch.randn(3)
    weights["with an attribute"].note = "kept by PyTorch alone"
    path = tmp_path / "odd.pth"
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path).weights["model"]
    for key, value in torch.load(path, weights_only=True)["model"].items():
        assert found[key].shape == tuple(value.shape), key
        assert found[key].dtype == jnp.dtype(str(value.dtype).removeprefix("torch.")), key
        np.testing.assert_array_equal(found[key].astype(float), value.detach().double(), key)


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_on_a_full_disk_the_older_file_stays(suffix: str, full_disk: Any, tmp_path: Path):
    weights = {"model": {"a.weight": np.ones(100_000, np.float32)}}
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"older")
    with pytest.raises((UserError, OSError), match=r"File too large"), full_disk(100_000):
        write_checkpoint(path, weights, {})
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_a_file_lacks_are_named(tmp_path: Path):
    torch.save(micro_state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth has no 'ema' weights, only 'model'"):
        am.load_torch_checkpoint(tmp_path / "bare.pth", weights="ema")


def test_weights_for_another_model_are_refused():
    model = am.ActiveMLP(**{**goldens.MICRO, "num_classes": 7})
    with pytest.raises(UserError, match=r"micro_checkpoint\.pth: head\.bias has shape \(10,\)"):
        am.load_torch_checkpoint(MICRO_CHECKPOINT, model=model)

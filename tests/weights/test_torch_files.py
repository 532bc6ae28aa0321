"""Files of PyTorch's world: what is understood, what is refused, and that nothing is run."""

import argparse
import io
import os
import pickle
import resource
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

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
def test_on_a_full_disk_the_older_file_stays(suffix: str, tmp_path: Path):
    weights = {"model": {"a.weight": np.ones(100_000, np.float32)}}
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises((UserError, OSError), match=r"File too large"):
            write_checkpoint(path, weights, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


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
        ("text.pth", b"these are no weights\n", "is not a PyTorch checkpoint, or is broken"),
        ("start.pth", b"PK\x03\x04", "is not a PyTorch checkpoint, or is broken"),
        ("half.pth", MICRO_CHECKPOINT.read_bytes()[:700_000], "is not a PyTorch checkpoint, or"),
        ("empty.safetensors", b"", "is empty"),
        ("text.safetensors", b"these are no weights\n", "is not a readable safetensors file"),
        ("torch.safetensors", MICRO_CHECKPOINT.read_bytes()[:9999], "not a readable safetensors"),
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


def nested_tensor() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its interface a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


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
        (broken("norm.bias", torch.zeros(32).to(torch.float8_e5m2)), r"of type torch\.float8_e5m2"),
        (broken("norm.bias", torch.zeros(32, 0)), r"shape \(32, 0\), expected no side of 0"),
        (
            broken("head.bias", torch.zeros(1).expand(10**13)),
            r"head\.bias has 40000000000000 bytes",
        ),
        ({"model": broken("norm.bias", "big")}, r"'norm\.bias' is a str, expected a named tensor"),
        ({"model": broken("norm.bias", torch.eye(32).to_sparse())}, r"norm\.bias is not a dense"),
        (
            broken("norm.bias", nested_tensor()),
            r"norm\.bias is not a dense tensor: _rebuild_nested",
        ),
        (
            {f"{i}.weight": tensor for i, tensor in enumerate([torch.zeros(10_000)] * 9)},
            r"1\.weight has 40000 bytes, 80000 with the tensors before it, more than",
        ),
        (
            {"model": micro_state_dict(), "activemlp_jax": "[" * 100_000},
            r"has a broken description of its model: .*nested 100000 levels deep",
        ),
        (
            {"model": micro_state_dict(), "activemlp_jax": {"format": 2}},
            r"has a broken description of its model",
        ),
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


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        with zipfile.ZipFile(file, "w", compression) as written:
            for name, content in members:
                written.writestr(name, content)
    return file.getvalue()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def floats(key: str, count: int) -> bytes:
    """The instructions of a pickle that name a storage."""
    claimed = count.to_bytes(8, "little")
    words = (b"X\x07\0\0\0storage", b"ctorch\nFloatStorage\n", b"X\x01\0\0\0" + key.encode())
    return b"(" + b"".join(words) + b"X\x03\0\0\0cpu\x8a\x08" + claimed


STEPS = b"K\0K\x01\x85K\x01\x85\x89}t"  # offset 0, shape (1,), stride (1,), and all of it a tuple
CLAIMS = b"ctorch._utils\n_rebuild_tensor_v2\n(" + floats("0", 10**12)
BEGINNING = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
A_WEIGHT = b"\x80\x02}X\x08\0\0\0a.weight"
CLAIMED = A_WEIGHT + CLAIMS + b"tQ" + STEPS + b"Rs."
BOMBS: dict[str, tuple[bytes, str]] = {
    "one number of two bytes, repeated": (
        saved({"a.weight": torch.zeros(1, dtype=torch.bfloat16).expand(10**8)}),
        "a.weight has 200000000 bytes, 200000000 with the tensors before it, more than the whole",
    ),
    "a compressed pickle": (
        archive(("x/data.pkl", b"." * 10**8), compression=zipfile.ZIP_DEFLATED),
        "'x/data.pkl' in it is compressed or encrypted",
    ),
    "a huge pickle": (
        archive(("x/data.pkl", b"." * 3 * 10**6)),
        "x/data.pkl has 3,000,000 bytes, expected at most 2,097,152",
    ),
    "two members of one name": (
        archive(("x/data.pkl", b"N."), ("x/data.pkl", b"N.")),
        "two of its members have one name",
    ),
    "a long table of members": (
        archive(*((f"x/data/{i}", b"") for i in range(50_000))),
        "is not a PyTorch checkpoint, or is broken",
    ),
    "a storage that is not there": (
        archive(("x/data.pkl", CLAIMED)),
        "is not a PyTorch checkpoint, or is broken",
    ),
    "a storage smaller than its tensor": (
        archive(("x/data.pkl", CLAIMED), ("x/data/0", b"\0" * 3)),
        "is broken or truncated: a.weight: its values are not all in the file",
    ),
    "a huge storage, before PyTorch 1.6": (
        BEGINNING + A_WEIGHT + CLAIMS + b"NtQ" + STEPS + b"Rs."
        + pickle.dumps(["0"], 2) + struct.pack("<q", 10**12),
        "is not a PyTorch checkpoint, or is broken",
    ),
    "a key whose hash takes forever": (
        archive(("x/data.pkl", b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s.")),
        "holds no weights: expected a state dict",
    ),
    "a place far away in the memo": (
        archive(("x/data.pkl", b"\x80\x02Nr\xff\xff\xff\xff.")),
        "holds a NoneType, expected a dict of weights",
    ),
    "deep tuples": (
        archive(("x/data.pkl", b"\x80\x02)" + b"\x85" * 20_000 + b".")),
        "holds a tuple, expected a dict of weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_claim_much_memory(name: str, tmp_path: Path):
    content, message = BOMBS[name]
    path = tmp_path / "bomb.pth"
    path.write_bytes(content)
    assert_refused_in_little_memory(path, message)


def assert_refused_in_little_memory(path: Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"


def test_a_safetensors_file_cannot_claim_a_huge_header(tmp_path: Path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    assert_refused_in_little_memory(path, "its header has 1,000,000,000,000 bytes")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "int32"), (torch.bool, "bool")],
)
def test_safetensors_of_another_type_are_named(dtype: Any, name: str, tmp_path: Path):
    save_tensors({"norm.bias": torch.ones(3).to(dtype)}, tmp_path / "odd.safetensors")
    with pytest.raises(
        UserError, match=rf"norm\.bias has values of type {name}, expected floating"
    ):
        read_checkpoint(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_regular_file_is_refused_without_waiting(suffix: str, tmp_path: Path):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(UserError, match=rf"{name}{suffix} is a {name}, expected a \.pth or"):
            read_checkpoint(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before PyTorch 1.6"])
def test_a_flipped_bit_is_one_clear_line_or_harmless(legacy: bool, tmp_path: Path):
    path, rng = tmp_path / "flipped.pth", np.random.default_rng(0)
    content = {"model": {"a.weight": torch.ones(3)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole, errors = path.read_bytes(), []
    for place in rng.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
        except UserError as error:
            errors.append(str(error))
    assert 0 < len(errors) < 300
    assert not [error for error in errors if "flipped.pth" not in error or "\n" in error]

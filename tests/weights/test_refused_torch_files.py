"""Bad PyTorch files are refused in one line, with little memory, and without running code."""

import argparse
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_tensors

import activemlp_jax as am
from activemlp_jax.utils.errors import UserError
from activemlp_jax.weights.torch_files import read_checkpoint

MICRO_CHECKPOINT = goldens.DATA / "micro_checkpoint.pth"


def micro_state_dict() -> dict[str, torch.Tensor]:
    arrays = goldens.rule_state_dict(goldens.torch_shapes(am.ActiveMLP(**goldens.MICRO)))
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in arrays.items()}


def refusal(path: Path) -> str:
    """Read a file that must be refused with little memory; return the error line."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    assert peak < 50e6, f"{peak / 1e6:.0f} MB"
    return line


class RunsCommand:
    """An object whose pickle runs `command` when it is loaded without restrictions."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "before PyTorch 1.6", "pickle"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights, hostile: {"model": weights, "args": hostile},
        lambda weights, hostile: {"meta": {"CLASSES": hostile}, "state_dict": weights},
    ],
    ids=["args", "meta"],
)
def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(
    wrap: Any, form: str, tmp_path: Path
):
    proof, path = tmp_path / "it_ran", tmp_path / "hostile.pth"
    content = wrap(micro_state_dict(), RunsCommand(f"touch {proof}"))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "hostile.pth needs posix.system to be read" in refusal(path)
    assert not proof.exists(), "the command was run"

    if form == "pickle":  # shows that the file works: unrestricted loading runs the command
        pickle.loads(path.read_bytes())
        assert proof.exists()


class Settings:
    """A class that is not part of PyTorch."""


def nested_tensor() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its interface a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def broken(key: str, value: Any) -> dict[str, Any]:
    return {**micro_state_dict(), key: value}


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about two members with one name
        with zipfile.ZipFile(file, "w", compression) as written:
            for name, content in members:
                written.writestr(name, content)
    return file.getvalue()


def floats(key: str, count: int) -> bytes:
    """Return pickle instructions that refer to a storage."""
    claimed = count.to_bytes(8, "little")
    words = (b"X\x07\0\0\0storage", b"ctorch\nFloatStorage\n", b"X\x01\0\0\0" + key.encode())
    return b"(" + b"".join(words) + b"X\x03\0\0\0cpu\x8a\x08" + claimed


STEPS = b"K\0K\x01\x85K\x01\x85\x89}t"  # a tuple of offset 0, shape (1,), stride (1,)
CLAIMS = b"ctorch._utils\n_rebuild_tensor_v2\n(" + floats("0", 10**12)
BEGINNING = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
A_WEIGHT = b"\x80\x02}X\x08\0\0\0a.weight"
CLAIMED = A_WEIGHT + CLAIMS + b"tQ" + STEPS + b"Rs."
NOT_READ = "is not a PyTorch checkpoint, or is broken or truncated"
NOT_SAFE = "is not a readable safetensors file"
MICRO_BYTES = MICRO_CHECKPOINT.read_bytes()
BOMBS = [
    # one number of two bytes, repeated
    ({"a.weight": torch.zeros(1, dtype=torch.bfloat16).expand(10**8)},
     "a.weight has 200000000 bytes, 200000000 with the tensors before it, more than the whole fil"),
    (archive(("x/data.pkl", b"." * 10**8), compression=zipfile.ZIP_DEFLATED),
     "'x/data.pkl' in it is compressed or encrypted"),
    (archive(("x/data.pkl", b"." * 3 * 10**6)),
     "x/data.pkl has 3,000,000 bytes, expected at most 2,097,152"),
    (archive(("x/data.pkl", b"N."), ("x/data.pkl", b"N.")), "two of its members have one name"),
    # a long table of members
    (archive(*((f"x/data/{i}", b"") for i in range(50_000))), NOT_READ),
    # a storage that is not there, one smaller than its tensor, and a huge one
    (archive(("x/data.pkl", CLAIMED)), NOT_READ),
    (archive(("x/data.pkl", CLAIMED), ("x/data/0", b"\0" * 3)),
     "is broken or truncated: a.weight: its values are not all in the file"),
    (BEGINNING + A_WEIGHT + CLAIMS + b"NtQ" + STEPS + b"Rs."
     + pickle.dumps(["0"], 2) + struct.pack("<q", 10**12), NOT_READ),
    # a key whose hash takes forever
    (archive(("x/data.pkl", b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s.")),
     "holds no weights: expected a state dict"),
    # a place far away in the memo
    (archive(("x/data.pkl", b"\x80\x02Nr\xff\xff\xff\xff.")),
     "holds a NoneType, expected a dict of weights"),
    # deep tuples
    (archive(("x/data.pkl", b"\x80\x02)" + b"\x85" * 20_000 + b".")),
     "holds a tuple, expected a dict of weights"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"these are no weights\n", NOT_READ),
        (b"PK\x03\x04", NOT_READ),
        (MICRO_BYTES[:700_000], NOT_READ),
        ([1, 2], "holds a list, expected a dict of weights"),
        ({}, "holds no weights: expected a state dict, or one under 'model', 'model_ema' or"),
        ({}, "'state_dict', found nothing"),
        ({"epoch": 3, "optimizer": {}}, "'state_dict', found epoch, optimizer"),
        (Settings(), "Settings to be read, and only tensors"),
        ({"args": Settings()}, "Settings to be read, and only tensors"),
        ({"model": {}, "args": argparse.Namespace(extra=Settings())}, "Settings to be read"),
        ({"meta": {"cfg": Settings()}, "state_dict": {}}, "Settings to be read, and only"),
        (broken("norm.weight", torch.full((32,), torch.nan)), "norm.weight has 32 of 32 values"),
        (broken("head.bias", torch.full((10,), torch.inf)), "head.bias has 10 of 10 values not"),
        (broken("norm.bias", torch.zeros(32, dtype=torch.int64)), "of type int64, expected float"),
        (broken("norm.bias", torch.zeros(32).to(torch.float8_e5m2)), "of type torch.float8_e5m2"),
        (broken("norm.bias", torch.zeros(32, 0)), "shape (32, 0), expected no side of 0"),
        (broken("head.bias", torch.zeros(1).expand(10**13)), "head.bias has 40000000000000 bytes"),
        ({"model": broken("norm.bias", "big")}, "'norm.bias' is a str, expected a named tensor"),
        ({"model": broken("norm.bias", torch.eye(32).to_sparse())}, "norm.bias is not a dense"),
        (broken("norm.bias", nested_tensor()), "norm.bias is not a dense tensor: _rebuild_nested"),
        (
            {f"{i}.weight": tensor for i, tensor in enumerate([torch.zeros(10_000)] * 9)},
            "1.weight has 40000 bytes, 80000 with the tensors before it, more than",
        ),
        (
            {"model": micro_state_dict(), "activemlp_jax": "[" * 100_000},
            "has a broken description of its model: it is not readable as JSON: nested 100000 lev",
        ),
        (
            {"model": micro_state_dict(), "activemlp_jax": {"format": 2}},
            "has a broken description of its model",
        ),
        *BOMBS,
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_without_usable_weights_is_one_clear_line(
    content: Any, message: str, tmp_path: Path
):
    path = tmp_path / "odd.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"these are no weights\n", NOT_SAFE),
        (MICRO_BYTES[:9999], NOT_SAFE),
        (struct.pack("<Q", 10**12) + b"{}", "its header has 1,000,000,000,000 bytes"),
        (torch.float8_e4m3fn, "norm.bias has values of type F8_E4M3, expected floating"),
        (torch.int32, "norm.bias has values of type int32, expected floating"),
        (torch.bool, "norm.bias has values of type bool, expected floating"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_safetensors_file_without_usable_weights_is_one_clear_line(
    content: Any, message: str, tmp_path: Path
):
    path = tmp_path / "odd.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_tensors({"norm.bias": torch.ones(3).to(content)}, path)
    assert message in refusal(path)


def test_a_path_without_a_file_is_one_clear_line(tmp_path: Path):
    assert "there is no file" in refusal(tmp_path / "none.pth")
    assert "is a folder, expected a .pth or .safetensors file" in refusal(tmp_path)


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

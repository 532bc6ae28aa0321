"""Weights in files of PyTorch's world: reading without running anything, and writing.

A `.safetensors` file is read without PyTorch; any other goes through `torch.load` with
`weights_only=True`, which needs the extra `torch`.
"""

import argparse
import hashlib
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from activemlp_jax.errors import UserError, install_command
from activemlp_jax.models.backbone import MIN_IMAGE_SIDE
from activemlp_jax.weights.architecture import Model, is_segmentor
from activemlp_jax.weights.torch_names import COUNT, as_numpy, from_torch

StateDict = dict[str, np.ndarray]

# The kinds of weights and the original's keys for them, the preferred kind first.
KINDS = {"ema": "model_ema", "model": "model"}

# Where a file of ours says what a state dict cannot: the key of a model.json's text.
DESCRIPTION = "activemlp_jax"


class TorchCheckpoint(NamedTuple):
    """What a file holds.

    `weights` has the state dicts by kind: 'model' as training left them, 'ema' their average; at
    least one. `epoch`, `image_size`, and of segmentation `iteration` and `class_names`, which need
    not fit the weights, are None where the file does not say, and `description`, the content of a
    `model.json`, where this package did not write it.
    """

    weights: dict[str, StateDict]
    epoch: int | None = None
    image_size: int | None = None
    description: Any = None
    iteration: int | None = None
    class_names: tuple[str, ...] | None = None


def choose_kind(kinds: Collection[str], kind: str, where: object) -> str:
    """'auto' resolved to the average where there is one; UserError if `kinds` lacks `kind`."""
    if kind == "auto":
        return next(name for name in KINDS if name in kinds)
    if kind not in kinds:
        raise UserError(f"{where} has no {kind!r} weights, only {', '.join(map(repr, kinds))}")
    return kind


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: str | os.PathLike[str]) -> TorchCheckpoint:
    """Read a classifier's weights or a segmentation model's; nothing in the file can run code.

    Args:
      path: a `.safetensors` file, or what `torch.save` wrote: the original's checkpoint
        `{'model', 'model_ema', ...}`, a state dict, or one under 'state_dict' as mmsegmentation
        has it, `{'meta', 'state_dict', ...}`; the prefix 'module.' of data-parallel training is
        dropped.

    Raises:
      UserError: no such file; broken, of another kind, or in need of a class other than tensors
        and `argparse.Namespace`, named; values that are no numbers of a weight.

    Source: the checkpoints of the authors' release.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a .pth or .safetensors file")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    content = dict(read(path))
    description = _parsed(content.pop(DESCRIPTION, None), path)
    found = _with_own_kind(_find_weights(content, path), description)
    weights = {
        kind: _checked(state_dict, f"{path}: {kind}: ", path.stat().st_size)
        for kind, state_dict in found.items()
    }
    epoch, meta = content.get("epoch"), content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    iteration = meta.get("iter")
    image_size = getattr(content.get("args"), "input_size", None)
    return TorchCheckpoint(
        weights,
        epoch if isinstance(epoch, int) else None,
        image_size if isinstance(image_size, int) and image_size >= MIN_IMAGE_SIDE else None,
        description,
        iteration if isinstance(iteration, int) else None,
        _class_names(meta.get("CLASSES")),
    )


def _with_own_kind(
    weights: dict[str, Mapping[str, Any]], description: Any
) -> dict[str, Mapping[str, Any]]:
    """One set alone is under the key of raw weights; what it is, the description says."""
    try:
        (kind,) = description["weights"]["kinds"]
        (state_dict,) = weights.values()
        return {kind: state_dict} if kind in KINDS else weights
    except (KeyError, TypeError, ValueError):
        return weights


def _class_names(found: object) -> tuple[str, ...] | None:
    if not isinstance(found, list | tuple) or not found:
        return None
    # One of mmsegmentation's names for ADE20K ends with a space.
    return tuple(map(str.strip, found)) if all(isinstance(name, str) for name in found) else None


def _parsed(description: object, path: Path) -> Any:
    if description is None:
        return None
    try:
        return json.loads(str(description))
    except ValueError as error:
        raise UserError(f"{path} has a broken description of its model: {error}") from error


def load_torch_checkpoint(
    path: str | os.PathLike[str], weights: str = "auto", model: Model | None = None
) -> dict[str, Any]:
    """Flax variables from a PyTorch or safetensors file; nothing in the file can run code.

    Args:
      path: a `.safetensors` file, or what `torch.save` wrote: a checkpoint of the original or of
        mmsegmentation, or a state dict.
      weights: 'ema', 'model', or 'auto': the average where the file has it.
      model: what the weights are for; without it, the model is inferred from the shapes.

    Returns:
      `{'params': tree}`, and for segmentation `batch_stats`, of numpy arrays in flax layout and the
      file's dtypes; but the counts of batch norm are int32.

    Raises:
      UserError: a file that cannot be read, lacks these weights, or does not fit the model.

    Source: the checkpoints of the authors' release.
    """
    found = read_checkpoint(path).weights
    try:
        variables = from_torch(found[choose_kind(found, weights, path)], model)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: {error}") from error
    return jax.tree.map(np.array, variables)  # copies: the file may change or go


def write_checkpoint(
    path: Path,
    weights: Mapping[str, StateDict],
    description: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Write state dicts by kind as the original does, for `torch.load`; whole or not at all.

    Args:
      path: a `.safetensors` file takes one kind; any other is PyTorch's, with the original's keys.
      weights: see `TorchCheckpoint`; of a segmentation model one kind, in mmsegmentation's form.
      description: of the model, as JSON takes it; kept beside the weights.
      class_names: by label, for mmsegmentation.

    Raises:
      UserError, OSError: it cannot be written.
    """
    text = json.dumps(description)
    aside = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".safetensors":
            (state_dict,) = weights.values()
            save_file(dict(state_dict), aside, metadata={"format": "pt", DESCRIPTION: text})
        else:
            torch = _import_torch(path)
            content: dict[str, Any] = {
                KINDS[kind]: {name: as_tensor(value) for name, value in state_dict.items()}
                for kind, state_dict in weights.items()
            }
            if any(map(is_segmentor, weights.values())):
                (tensors,) = content.values()
                meta = {"CLASSES": tuple(class_names)} if class_names else {}
                content = {"meta": meta, "state_dict": tensors}
            with aside.open("wb") as file:
                torch.save({**content, DESCRIPTION: text}, file)
        os.replace(aside, path)
    except (RuntimeError, SafetensorError) as error:  # how the two libraries report a full disk
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch: {install_command('torch')}, or use a .safetensors file"
        ) from error
    return torch


def as_tensor(value: np.ndarray) -> Any:
    """A PyTorch tensor that shares the memory of an array."""
    import torch

    if value.dtype == jnp.bfloat16:  # not a type of numpy's own, which PyTorch asks for
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        described = {key: value for key, value in metadata.items() if key == DESCRIPTION}
        return load_file(path) | described
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from error


def _read_torch(path: Path) -> Mapping[Any, Any]:
    torch = _import_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of other versions, which end below
            # Mapped into memory, the optimiser's state is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken file makes PyTorch raise nearly anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        name = refused[1] if refused else _first_foreign_class(path, is_zip)
        if name:
            raise UserError(
                f"{path} needs {name} to be read, and only tensors and argparse.Namespace are "
                "allowed; nothing of it was run"
            ) from error
        raise UserError(f"{path} is no PyTorch checkpoint, or a broken or truncated one") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def _first_foreign_class(path: Path, is_zip: bool) -> str | None:
    """A class or function, not PyTorch's, that a pickle asks for; it is scanned, never run."""
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                names = list(_names_in_pickle(archive.read(name)))
        else:
            names = list(_names_in_pickle(path.read_bytes()))
    except (ValueError, StopIteration, zipfile.BadZipFile, EOFError):
        return None
    allowed = ("argparse.Namespace", "collections.", "torch.")
    return next((name for name in names if not name.startswith(allowed)), None)


def _names_in_pickle(data: bytes) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def _find_weights(content: Mapping[Any, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """The state dicts of a file by kind."""
    nested = content.get("state_dict")
    found = {kind: content.get(key) for kind, key in KINDS.items()}
    weights = {kind: value for kind, value in found.items() if isinstance(value, Mapping) and value}
    if not weights and isinstance(nested, Mapping) and nested:
        weights = {"model": nested}
    if not weights and content and all(hasattr(value, "shape") for value in content.values()):
        weights = {"model": content}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise UserError(
            f"{path} holds no weights: expected a state dict, or one under 'model', 'model_ema' or "
            f"'state_dict', found {keys}"
        )
    return {kind: _without_prefix(state_dict) for kind, state_dict in weights.items()}


def _without_prefix(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the 'module.' that data-parallel training puts before every key."""
    if all(str(key).startswith("module.") for key in state_dict):
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return state_dict


def _checked(state_dict: Mapping[str, Any], where: str, file_size: int) -> StateDict:
    """As numpy arrays, each floating and finite, or a count, and no larger than the file."""
    arrays = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not hasattr(value, "shape"):
            raise UserError(f"{where}{key!r} is a {type(value).__name__}, expected a named tensor")
        try:
            array = as_numpy(value)
        except (TypeError, RuntimeError) as error:  # sparse or quantised tensors
            raise UserError(f"{where}{key} is no dense tensor: {error}") from error
        if array.nbytes > file_size:  # a few bytes, repeated: too large to look at
            raise UserError(f"{where}{key} has {array.nbytes} bytes, more than the whole file")
        if key.endswith(f".{COUNT}"):
            _check_count(array, f"{where}{key}")
        else:
            _check_weight(array, f"{where}{key}")
        arrays[key] = array
    return arrays


def _check_weight(array: np.ndarray, what: str) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{what} has values of type {array.dtype}, expected floating")
    not_finite = array.size - int(np.isfinite(array).sum())
    if not_finite:
        raise UserError(f"{what} has {not_finite} of {array.size} values not finite")


def _check_count(array: np.ndarray, what: str) -> None:
    """Of batches that a batch norm saw: the one integer that a state dict may hold."""
    if array.dtype != np.int64 or array.shape:
        found = f"type {array.dtype} and shape {array.shape}"
        raise UserError(f"{what} has {found}, expected one count of type int64")
    most = np.iinfo(np.int32).max  # it is of 32 bits in flax
    if not 0 <= array <= most:
        raise UserError(f"{what} is {array}, expected a count between 0 and {most}")

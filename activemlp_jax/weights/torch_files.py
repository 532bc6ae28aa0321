"""Weights in PyTorch's and safetensors files: read without running anything, and written.

Reading needs no PyTorch; writing any file but `.safetensors` needs the extra `torch`.
"""

import json
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.utils.errors import UserError, install_command
from activemlp_jax.utils.files import KINDS as FILE_KINDS
from activemlp_jax.utils.files import write_aside
from activemlp_jax.utils.json_files import parse_json
from activemlp_jax.weights.architecture import Model, is_segmentor, list_keys
from activemlp_jax.weights.torch_names import COUNT, from_torch
from activemlp_jax.weights.torch_pickle import Tensor, TorchFile, Unread

StateDict = dict[str, np.ndarray]

# The kinds of weights and the original's keys for them, the preferred kind first.
KINDS = {"ema": "model_ema", "model": "model"}

FLOATS = ("float16", "bfloat16", "float32", "float64")  # types of weights
SAFETENSORS_TYPES = (  # those that numpy has
    *("F16", "BF16", "F32", "F64", "BOOL"),
    *("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"),
)
MOST_HEADER = 8 * 2**20  # bytes, of a safetensors file
VALUES = (Tensor, Unread, np.ndarray)  # what may stand for a tensor of a state dict

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


def read_checkpoint(path: str | os.PathLike[str]) -> TorchCheckpoint:
    """Read a classifier's weights or a segmentation model's; nothing in the file can run code.

    No more is read into memory than twice the file's size.

    Args:
      path: a `.safetensors` file, or what `torch.save` wrote: the original's checkpoint
        `{'model', 'model_ema', ...}`, a state dict, or one under 'state_dict' as mmsegmentation
        has it, `{'meta', 'state_dict', ...}`; the prefix 'module.' of data-parallel training is
        dropped.

    Raises:
      UserError: no such file; broken, of another kind, or in need of a class other than tensors
        and `argparse.Namespace`, named; values that are no numbers of a weight, or more of them
        than the file holds.

    Source: the checkpoints of the authors' release.
    """
    path = Path(path)
    try:
        found = path.stat()
        kind = FILE_KINDS.get(stat.S_IFMT(found.st_mode))
        if kind:
            raise UserError(f"{path} is {kind}, expected a .pth or .safetensors file")
        if found.st_size == 0:
            raise UserError(f"{path} is empty")
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        return read(path, found.st_size)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory") from error


def _read_torch(path: Path, size: int) -> TorchCheckpoint:
    with TorchFile(path) as file:
        content = file.content
        if not isinstance(content, dict):
            kind = content.name if isinstance(content, Unread) else type(content).__name__
            raise UserError(f"{path} holds a {kind}, expected a dict of weights")
        description = _parsed(content.pop(DESCRIPTION, None), path)
        state_dicts = _find_weights(content, path)
        for name, state_dict in state_dicts.items():
            _check_sizes(state_dict, f"{path}: {name}: ", size)
        weights = {
            name: {key: _values(file, key, value) for key, value in state_dict.items()}
            for name, state_dict in state_dicts.items()
        }
    args, meta = content.get("args"), content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    settings = args.state if isinstance(args, Unread) and isinstance(args.state, dict) else {}
    return _checkpoint(
        path,
        weights,
        description,
        epoch=_whole(content.get("epoch"), 0),
        image_size=_whole(settings.get("input_size"), MIN_IMAGE_SIDE),
        iteration=_whole(meta.get("iter"), 0),
        class_names=_class_names(meta.get("CLASSES")),
    )


def _read_safetensors(path: Path, size: int) -> TorchCheckpoint:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, MOST_HEADER):
        raise UserError(f"{path} is no readable safetensors file: its header has {header:,} bytes")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                name = file.get_slice(key).get_dtype()
                if name not in SAFETENSORS_TYPES:
                    raise UserError(
                        f"{path}: model: {_shown(key)} has values of type {name}, expected floating"
                    )
        weights = load_file(path)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from error
    description = _parsed(metadata.get(DESCRIPTION), path)
    return _checkpoint(path, _find_weights(weights, path), description)


def _checkpoint(
    path: Path, weights: dict[str, StateDict], description: Any, **rest: Any
) -> TorchCheckpoint:
    weights = _with_own_kind(weights, description)
    for kind, state_dict in weights.items():
        for key, array in state_dict.items():
            what = f"{path}: {kind}: {_shown(key)}"
            _check_count(array, what) if key.endswith(f".{COUNT}") else _check_weight(array, what)
    return TorchCheckpoint(weights, description=description, **rest)


def _whole(value: object, low: int) -> int | None:
    """The value if it is an integer of 64 bits from `low` up, as a file may hold anything."""
    return value if type(value) is int and low <= value < 2**63 else None


def _with_own_kind(weights: dict[str, StateDict], description: Any) -> dict[str, StateDict]:
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


def _parsed(description: Any, path: Path) -> Any:
    if description is None:
        return None
    try:
        return parse_json(description, "it")
    except (TypeError, ValueError) as error:
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
    try:
        with write_aside(path) as aside:
            if path.suffix == ".safetensors":
                (state_dict,) = weights.values()
                save_file(dict(state_dict), aside, metadata={"format": "pt", DESCRIPTION: text})
            else:
                _save_torch(path, aside, weights, text, class_names)
    except (RuntimeError, SafetensorError) as error:  # how the two libraries report a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path} cannot be written: {cause}") from error


def _save_torch(
    path: Path,
    aside: Path,
    weights: Mapping[str, StateDict],
    text: str,
    class_names: Sequence[str] | None,
) -> None:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch: {install_command('torch')}, or use a .safetensors file"
        ) from error
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


def as_tensor(value: np.ndarray) -> Any:
    """A PyTorch tensor that shares the memory of an array."""
    import torch

    if value.dtype == jnp.bfloat16:  # not a type of numpy's own, which PyTorch asks for
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _find_weights(content: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The state dicts of a file by kind."""
    nested = content.get("state_dict")
    found = {kind: content.get(key) for kind, key in KINDS.items()}
    weights = {kind: value for kind, value in found.items() if isinstance(value, dict) and value}
    if not weights and isinstance(nested, dict) and nested:
        weights = {"model": nested}
    if not weights and content and all(isinstance(value, VALUES) for value in content.values()):
        weights = {"model": dict(content)}
    if not weights:
        keys = list_keys([*map(_shown, content)]) or "nothing"
        raise UserError(
            f"{path} holds no weights: expected a state dict, or one under 'model', 'model_ema' or "
            f"'state_dict', found {keys}"
        )
    return {kind: _without_prefix(state_dict) for kind, state_dict in weights.items()}


def _without_prefix(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without the 'module.' that data-parallel training puts before every key."""
    if all(str(key).startswith("module.") for key in state_dict):
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return state_dict


def _check_sizes(state_dict: Mapping[Any, Any], where: str, file_size: int) -> None:
    """Raises UserError unless all values are tensors of weights, together no larger than the file.

    Tensors may share their values, and repeat them: a small file can claim any size.
    """
    total = 0
    for key, value in state_dict.items():
        what = f"{where}{_shown(key)}"
        if isinstance(value, Unread):
            raise UserError(f"{what} is no dense tensor: {value.name}")
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{where}{key!r:.200} is a {kind}, expected a named tensor")
        if value.type_name != str(value.storage.dtype):  # one that numpy lacks
            raise UserError(f"{what} has values of type {value.type_name}, expected floating")
        if 0 in value.shape:
            raise UserError(f"{what} has shape {value.shape}, expected no side of 0")
        total += value.nbytes
        if total > file_size:
            raise UserError(
                f"{what} has {value.nbytes} bytes, {total} with the tensors before it, more than "
                f"the whole file with {file_size}"
            )


def _shown(key: object) -> str:
    """A key, which may be anything, for an error."""
    return str(key.name if isinstance(key, Unread) else key)[:200]


def _values(file: TorchFile, key: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.read(file)
    except ValueError as error:
        raise UserError(f"{file.path} is broken or truncated: {_shown(key)}: {error}") from error


def _check_weight(array: np.ndarray, what: str) -> None:
    if array.dtype.name not in FLOATS:
        raise UserError(f"{what} has values of type {array.dtype}, expected floating")
    not_finite = array.size - int(np.isfinite(array).sum())
    if not_finite:
        raise UserError(f"{what} has {not_finite} of {array.size} values not finite")


def _check_count(array: np.ndarray, what: str) -> None:
    """Raises unless this is a number of batches seen, the one integer of a state dict."""
    if array.dtype != np.int64 or array.shape:
        found = f"type {array.dtype} and shape {array.shape}"
        raise UserError(f"{what} has {found}, expected one count of type int64")
    most = np.iinfo(np.int32).max  # it is of 32 bits in flax
    if not 0 <= array <= most:
        raise UserError(f"{what} is {array}, expected a count between 0 and {most}")

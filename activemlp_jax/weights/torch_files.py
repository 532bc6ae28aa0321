"""Read and write weights in PyTorch and safetensors files; reading a file never runs its code.

Reading does not need PyTorch. Writing any format except `.safetensors` needs the optional
dependencies [torch].
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.models.segmentor import Model
from activemlp_jax.utils.errors import UserError, install_command
from activemlp_jax.utils.files import KINDS as FILE_KINDS
from activemlp_jax.utils.files import write_aside
from activemlp_jax.utils.json_files import parse_json
from activemlp_jax.weights.torch_names import BATCH_COUNT, from_torch, is_mmsegmentation, list_keys
from activemlp_jax.weights.torch_pickle import Opaque, Tensor, read_torch_file

StateDict = dict[str, np.ndarray]

# Kinds of weights, the preferred one first, and their keys in the original's checkpoints.
KINDS = {"ema": "model_ema", "model": "model"}

WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")
NUMPY_TYPES = re.compile(r"BF16|BOOL|F(16|32|64)|[IU](8|16|32|64)")  # in a safetensors file
MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file
STATE_DICT_VALUES = (Tensor, Opaque, np.ndarray)  # `_read_tensors` rejects an Opaque by name

# The key under which files written here store the text of a model.json, next to the state dict.
DESCRIPTION = "activemlp_jax"


class TorchCheckpoint(NamedTuple):
    """The content of a checkpoint file.

    `weights` has one or two state dicts by kind: 'model' for the weights of the last step, 'ema'
    for their average. The other fields are None unless the file contains them: `epoch` and
    `image_size`; for segmentation `iteration` and `class_names`, which may not match the weights;
    and `description`, the content of a `model.json`, if this package wrote the file.
    """

    weights: dict[str, StateDict]
    epoch: int | None = None
    image_size: int | None = None
    description: Any = None
    iteration: int | None = None
    class_names: tuple[str, ...] | None = None


def choose_kind(kinds: Collection[str], kind: str, where: object) -> str:
    """Return `kind`, or for 'auto' the preferred one of `kinds`.

    Raises UserError, whose message starts with `where`, if `kinds` does not contain `kind`.
    """
    if kind == "auto":
        return next(name for name in KINDS if name in kinds)
    if kind not in kinds:
        raise UserError(f"{where} has no {kind!r} weights, only {', '.join(map(repr, kinds))}")
    return kind


def read_checkpoint(path: str | os.PathLike[str]) -> TorchCheckpoint:
    """Read a file of weights, which cannot run code, in memory of at most twice the file's size.

    The file is a `.safetensors` file or one that `torch.save` wrote. The latter holds a checkpoint
    of the original, `{'model', 'model_ema', ...}`; a checkpoint of mmsegmentation, `{'meta',
    'state_dict', ...}`; or a state dict, bare or under 'state_dict'. The prefix 'module.' of
    data-parallel training is dropped.

    Raises UserError if the file is missing, broken, or of another type; if it needs a class other
    than tensors and `argparse.Namespace`; if a value is not finite or has the wrong dtype; or if
    the tensors claim more values than the file holds.
    """
    path = Path(path)
    try:
        status = path.stat()
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode))
        if kind:
            raise UserError(f"{path} is {kind}, expected a .pth or .safetensors file")
        if status.st_size == 0:
            raise UserError(f"{path} is empty")
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        return _checkpoint(path, *read(path, status.st_size))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{path} is too large for this machine's memory") from error


def _checkpoint(
    path: Path, weights: dict[str, StateDict], content: Mapping[Any, Any]
) -> TorchCheckpoint:
    """Check the values of state dicts, and combine them with the other contents of the file."""
    description: Any = content.get(DESCRIPTION)
    if description is not None:
        try:
            description = parse_json(description, "it")
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} has a broken description of its model: {error}") from error
    with contextlib.suppress(KeyError, TypeError, ValueError):
        # A single set of weights is stored as 'model'; the description says which kind it is.
        (kind,), (state_dict,) = description["weights"]["kinds"], weights.values()
        weights = {kind: state_dict} if kind in KINDS else weights
    for kind, state_dict in weights.items():
        for key, array in state_dict.items():
            _check_values(array, f"{path}: {kind}: {_key_text(key)}")
    args, meta = content.get("args"), content.get("meta")
    settings = args.state if isinstance(args, Opaque) and isinstance(args.state, dict) else {}
    meta = meta if isinstance(meta, dict) else {}
    names = meta.get("CLASSES")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        names = ()
    return TorchCheckpoint(
        weights,
        description=description,
        epoch=_int_or_none(content.get("epoch"), 0),
        image_size=_int_or_none(settings.get("input_size"), MIN_IMAGE_SIDE),
        iteration=_int_or_none(meta.get("iter"), 0),
        # One of mmsegmentation's names for ADE20K ends with a space.
        class_names=tuple(map(str.strip, names)) or None,
    )


def _read_torch(path: Path, size: int) -> tuple[dict[str, StateDict], Mapping[Any, Any]]:
    """Return the state dicts by kind, and the whole content of the file."""
    content = read_torch_file(path)
    if not isinstance(content, dict):
        kind = content.name if isinstance(content, Opaque) else type(content).__name__
        raise UserError(f"{path} holds a {kind}, expected a dict of weights")
    weights = {
        kind: _read_tensors(path, kind, state_dict, size)
        for kind, state_dict in _find_state_dicts(content, path).items()
    }
    return weights, content


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, StateDict], Mapping[Any, Any]]:
    """Return the state dict under its kind, and the metadata of the file."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size, MAX_HEADER_BYTES):
        raise UserError(
            f"{path} is not a readable safetensors file: its header has {header:,} bytes"
        )
    weights = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                type_name = file.get_slice(key).get_dtype()
                if not NUMPY_TYPES.fullmatch(type_name):
                    raise UserError(
                        f"{path}: model: {_key_text(key)} has values of type {type_name}, "
                        "expected floating"
                    )
                weights[key] = file.get_tensor(key)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return _find_state_dicts(weights, path), metadata


def _int_or_none(value: object, low: int) -> int | None:
    """Return `value` from a file if it is a 64-bit integer of at least `low`, or else None."""
    return value if type(value) is int and low <= value < 2**63 else None


def _find_state_dicts(content: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return the state dicts of a file by kind, without the prefix of data-parallel training."""
    rest = {key: value for key, value in content.items() if key != DESCRIPTION}
    values = {kind: content.get(key) for kind, key in KINDS.items()}
    if not any(isinstance(value, dict) and value for value in values.values()):
        is_bare = all(isinstance(value, STATE_DICT_VALUES) for value in rest.values())
        values = {"model": rest if is_bare else content.get("state_dict")}
    state_dicts = {
        kind: {key.removeprefix("module."): v for key, v in value.items()}
        if all(str(key).startswith("module.") for key in value)
        else value
        for kind, value in values.items()
        if isinstance(value, dict) and value
    }
    if not state_dicts:
        keys = list_keys([*map(_key_text, rest)], 8) or "nothing"
        raise UserError(
            f"{path} holds no weights: expected a state dict, or one under 'model', 'model_ema' or "
            f"'state_dict', found {keys}"
        )
    return state_dicts


def _read_tensors(
    path: Path, kind: str, state_dict: Mapping[Any, Any], file_size: int
) -> StateDict:
    """Read the values of a state dict, all of which must be dense tensors."""
    arrays = {}
    total = 0  # tensors can share and repeat values, so a small file can claim any size
    for key, value in state_dict.items():
        name = f"{path}: {kind}: {_key_text(key)}"
        if isinstance(value, Opaque):
            raise UserError(f"{name} is not a dense tensor: {value.name}")
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = type(value).__name__
            raise UserError(f"{path}: {kind}: {key!r:.200} is a {found}, expected a named tensor")
        if value.type_name != str(value.storage.dtype):  # a dtype that numpy lacks
            raise UserError(f"{name} has values of type {value.type_name}, expected floating")
        if 0 in value.shape:
            raise UserError(f"{name} has shape {value.shape}, expected no side of 0")
        total += value.nbytes
        if total > file_size:
            raise UserError(
                f"{name} has {value.nbytes} bytes, {total} with the tensors before it, more than "
                f"the whole file with {file_size}"
            )
        try:
            arrays[key] = value.read(path)
        except ValueError as error:
            raise UserError(f"{path} is broken or truncated: {_key_text(key)}: {error}") from error
    return arrays


def _key_text(key: object) -> str:
    """Return a key, which may be any object, as a short text for an error."""
    return str(key.name if isinstance(key, Opaque) else key)[:200]


def _check_values(array: np.ndarray, name: str) -> None:
    """Raise UserError for weights that are not finite floats, or an invalid count of batches."""
    if name.endswith(f".{BATCH_COUNT}"):
        highest = np.iinfo(np.int32).max  # the flax variable is int32
        if array.dtype != np.int64 or array.shape:
            found = f"type {array.dtype} and shape {array.shape}"
            raise UserError(f"{name} has {found}, expected one count of type int64")
        if not 0 <= array <= highest:
            raise UserError(f"{name} is {array}, expected a count between 0 and {highest}")
        return
    if array.dtype.name not in WEIGHT_DTYPES:
        raise UserError(f"{name} has values of type {array.dtype}, expected floating")
    not_finite = array.size - int(np.isfinite(array).sum())
    if not_finite:
        raise UserError(f"{name} has {not_finite} of {array.size} values not finite")


def load_torch_checkpoint(
    path: str | os.PathLike[str], weights: str = "auto", model: Model | None = None
) -> dict[str, Any]:
    """Load flax variables from a PyTorch or safetensors file; nothing in the file can run code.

    Args:
      path: a `.safetensors` file, or a file that `torch.save` wrote: a checkpoint of the original
        or of mmsegmentation, or a state dict.
      weights: 'ema', 'model', or 'auto' for the averaged weights if the file has them.
      model: the model that the weights are for; by default, it is inferred from the shapes.

    Returns:
      `{'params': tree}`, and for segmentation `batch_stats`: numpy arrays in flax layout, in the
      dtypes of the file, except that batch norm's counts are int32.

    Raises:
      UserError: the file cannot be read, lacks these weights, or does not fit the model.

    Source: the checkpoints of the authors' release.
    """
    state_dicts = read_checkpoint(path).weights
    state_dict = state_dicts[choose_kind(state_dicts, weights, path)]
    try:
        variables = from_torch(state_dict, model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return jax.tree.map(np.array, variables)  # copies: the file may change or disappear


def write_checkpoint(
    path: Path,
    weights: Mapping[str, StateDict],
    description: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Write state dicts by kind, with the content of a `model.json` as `description`, atomically.

    A `.safetensors` file holds one kind of weights. With any other suffix, `path` becomes a file
    for `torch.load`: in the original's format, or for a segmentation model, which has one kind of
    weights, in mmsegmentation's format with `class_names`.

    Raises UserError or OSError if the file cannot be written.
    """
    text = json.dumps(description)
    try:
        with write_aside(path) as partial:
            if path.suffix == ".safetensors":
                (state_dict,) = weights.values()
                save_file(dict(state_dict), partial, metadata={"format": "pt", DESCRIPTION: text})
                return
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
            if any(map(is_mmsegmentation, weights.values())):
                (tensors,) = content.values()
                meta = {"CLASSES": tuple(class_names)} if class_names else {}
                content = {"meta": meta, "state_dict": tensors}
            with partial.open("wb") as file:
                torch.save({**content, DESCRIPTION: text}, file)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path} cannot be written: {cause}") from error


def as_tensor(value: np.ndarray) -> Any:
    """Return a PyTorch tensor that shares the memory of an array."""
    import torch

    if value.dtype == jnp.bfloat16:  # torch.from_numpy takes only numpy's own dtypes
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)

"""Read files that `torch.save` wrote, without PyTorch and without running their code.

Such a file holds a pickle, which is a program that builds objects, and, separately, the values of
the tensors. This module interprets the program without resolving any name in it: a tensor becomes a
description of its shape and its position in the file, and an object of another class becomes an
`Opaque` placeholder. So a file can neither run code nor claim more data than it holds.

Source: `torch.serialization` for the two file formats, `pickletools` for the pickle.
"""

import dataclasses
import io
import math
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import short

MAX_PICKLE_BYTES = 2 * 2**20  # a large model with its optimizer needs a quarter of a MB
LEGACY_HEADER = (0x1950A86A20F9469CFC6C, 1001)  # first two pickles of files before PyTorch 1.6
BIG_ENDIAN = "its numbers have their high byte first; save it on another machine"
MAX_DIMENSIONS = 8
MAX_INT = 2**63 - 1
MAX_ARGUMENTS = 16  # of a function call

# Names that a pickle may contain. No name is ever resolved; other names are rejected with an error.
ALLOWED_NAMES = re.compile(
    r"torch\.((cuda\.)?(sparse\.)?\w+|storage\.\w+|_utils\._rebuild_\w+|nn\.parameter\.Parameter)"
    r"|torch\.(_tensor\._rebuild_from_type_v2|serialization\._get_layout)"
    r"|torch\.nested\._internal\.nested_tensor\.\w+"
    r"|collections\.(Counter|OrderedDict)|argparse\.Namespace|_codecs\.encode"
    r"|builtins\.(set|complex|bytearray)"
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# What an opcode that pushes its own argument leaves on the stack, as `pickletools` names it.
LITERALS = {"int", "int_or_bool", "float", "str", "bytes", "bytes_or_str"}
STORAGE_DTYPES = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Short": np.int16,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    **dict.fromkeys(("Int", "QInt32"), np.int32),
    **dict.fromkeys(("Char", "QInt8"), np.int8),
    **dict.fromkeys(("Byte", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"), np.uint8),
}
BROKEN_FILE_ERRORS = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, RecursionError),
    *(TypeError, ValueError, struct.error, zipfile.BadZipFile),
)


@dataclasses.dataclass(eq=False, repr=False)
class Opaque:
    """A placeholder for a class or a function, or for an object made by one.

    It has only the name, and in `state` the dict of the object's attributes if the pickle sets one.
    """

    name: str
    state: Any = None


@dataclasses.dataclass(eq=False, repr=False)
class Storage:
    """Values of one or more tensors; `position` and `size` locate them in the file, in bytes."""

    dtype: np.dtype
    position: int = 0
    size: int = 0
    values: np.ndarray | None = None  # raw bytes, uint8, once they are read


@dataclasses.dataclass(eq=False, repr=False)
class Tensor:
    """A dense tensor in a file; `offset` and `strides` are in elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    type_name: str  # numpy's or PyTorch's name of the dtype

    def __post_init__(self) -> None:
        are_tuples = isinstance(self.shape, tuple) and isinstance(self.strides, tuple)
        if not are_tuples or not len(self.shape) == len(self.strides) <= MAX_DIMENSIONS:
            raise ValueError("a tensor with an invalid shape")
        for size in (self.offset, *self.shape, *self.strides):
            if type(size) is not int or not 0 <= size <= MAX_INT:
                raise ValueError("a tensor with an invalid size")

    @property
    def nbytes(self) -> int:
        """Size in bytes, which can exceed the storage's if strides repeat values."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self, path: Path) -> np.ndarray:
        """Read the values, in memory shared by all tensors of a storage; may raise ValueError."""
        storage, itemsize = self.storage, self.storage.dtype.itemsize
        axes = list(zip(self.shape, self.strides, strict=True))
        last = self.offset + sum((n - 1) * stride for n, stride in axes)
        if storage.values is None:
            storage.values = np.fromfile(path, np.uint8, storage.size, offset=storage.position)
            if len(storage.values) != storage.size:
                raise ValueError("the file became shorter")
        # numpy checks this too, but its arithmetic can overflow.
        if (last + 1) * itemsize > len(storage.values):
            raise ValueError("its values are not all in the file")
        strides = [stride * itemsize if n > 1 else 0 for n, stride in axes]
        start = self.offset * itemsize
        return np.ndarray(self.shape, storage.dtype, storage.values.data, start, strides)


class _SmallReads(io.FileIO):
    """A file that refuses to read more than `MAX_PICKLE_BYTES`, which only broken files need."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_PICKLE_BYTES:
            raise ValueError(f"{size} bytes at once")
        return super().read(size)


def read_torch_file(path: Path) -> Any:
    """Return the object that `torch.save` wrote, with a `Tensor` for each tensor.

    Raises UserError if the file is of another type, is broken, or needs a forbidden class.
    """
    try:
        with _SmallReads(path) as file:
            is_archive = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_archive(file) if is_archive else _read_legacy(file)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except BROKEN_FILE_ERRORS as error:
        raise UserError(f"{path} is not a PyTorch checkpoint, or is broken or truncated") from error


def _refuse(reason: str) -> NoReturn:
    raise UserError(f"is not an archive that torch.save writes: {reason}")


def _read_archive(file: io.FileIO) -> Any:
    """Read a zip archive: a pickle, and each storage in a member of its own."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) < len(infos):
        _refuse("two of its members have one name")
    for name, member in members.items():
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            _refuse(f"{short(name)} in it is compressed or encrypted")
    total, length = sum(info.file_size for info in infos), file.seek(0, io.SEEK_END)
    if total > length:
        _refuse(f"its members have {total:,} bytes, the file has {length:,}")

    def seek(member: zipfile.ZipInfo) -> int:
        """Go to a member's data, which follow its header, name and extra field."""
        if member.header_offset < 0:
            raise ValueError("a member outside the file")
        file.seek(member.header_offset)
        return file.seek(sum(struct.unpack("<26xHH", file.read(30))), io.SEEK_CUR)

    def read(member: zipfile.ZipInfo) -> bytes:
        seek(member)
        return file.read(member.file_size)

    (pickle_name,) = (name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name))
    root = pickle_name.removesuffix("data.pkl")
    byte_order = members.get(f"{root}byteorder")  # missing in older files
    if byte_order and read(byte_order) == b"big":
        _refuse(BIG_ENDIAN)
    size = members[pickle_name].file_size
    if size > MAX_PICKLE_BYTES:
        _refuse(f"{pickle_name} has {size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    storages: dict[str, Storage] = {}
    content = _interpret(io.BytesIO(read(members[pickle_name])), storages)
    for key, storage in storages.items():
        member = members[f"{root}data/{key}"]
        storage.position, storage.size = seek(member), member.file_size
    return content


def _read_legacy(file: io.FileIO) -> Any:
    """Read the format before PyTorch 1.6: five pickles, then the storages in sequence."""
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    storages: dict[str, Storage] = {}
    header = tuple(_interpret(head, storages) for _ in LEGACY_HEADER)
    if header != LEGACY_HEADER:
        raise ValueError("not a PyTorch file")
    if _interpret(head, storages).get("little_endian") is False:
        _refuse(BIG_ENDIAN)
    content, keys = _interpret(head, storages), _interpret(head, storages)
    position, length = head.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        storage = storages[key]
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        storage.position, storage.size = position + 8, count * storage.dtype.itemsize
        position = storage.position + storage.size
        if count < 0 or position > length:
            raise ValueError("a storage outside the file")
    return content


def _interpret(pickle: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """Return the object that a pickle builds; add its storages to `storages`, by key."""
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []  # one for each open mark
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        taken = opcode.stack_before
        items: list[Any] = []
        if pickletools.markobject in taken:  # the opcode takes everything since the mark
            items, stack = stack, outer_stacks.pop()
            taken = taken[: taken.index(pickletools.markobject)]
        if taken:
            items = stack[-len(taken) :] + items
            del stack[-len(taken) :]
        match opcode.name:
            case "PROTO" | "FRAME" | "POP":
                pass
            case "STOP":
                return items.pop()
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                outer_stacks.append(stack)
                stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = items[0]
                stack += items
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument)])
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "EMPTY_LIST" | "LIST":
                stack.append(items)
            case "EMPTY_DICT" | "DICT":
                stack.append(_add({}, items))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS":
                stack.append(_add(items[0], items[1:]))
            case "EMPTY_SET" | "FROZENSET":
                stack.append(Opaque("set"))
            case "GLOBAL" | "INST":
                stack.append(_global(*argument.split(" ")))
            case "STACK_GLOBAL":
                stack.append(_global(*items))
            case "BINPERSID":
                stack.append(_storage(items[0], storages))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*items))
            case "BUILD":
                target, state = items
                if isinstance(target, Opaque):
                    target.state = state
                stack.append(target)
            case name if opcode.stack_after and opcode.stack_after[0].name in LITERALS:
                stack.append(argument)
            case unknown:
                raise ValueError(f"unknown opcode {unknown}")
    raise ValueError("no end")


def _global(module: Any, name: Any) -> Opaque:
    """Return a placeholder for a class or a function; raise UserError if it is not allowed."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name that is not a string")
    full_name = f"{module}.{name}".replace("__builtin__.", "builtins.")
    if not ALLOWED_NAMES.fullmatch(full_name):
        raise UserError(
            f"needs {full_name[:80]} to be read, and only tensors and argparse.Namespace are "
            "allowed; nothing in it was run"
        )
    return Opaque(full_name)


def _storage(reference: Any, storages: dict[str, Storage]) -> Storage | Opaque:
    """Return the storage that ('storage', type, key, device, count[, view]) refers to."""
    match reference:
        case ("storage", Opaque(name=type_name), str(key), _, _, *view):
            if view not in ([], [None]):  # old files may add a view
                return Opaque("a view of a storage")
        case _:
            raise ValueError("an invalid reference to a storage")
    dtype = np.dtype(STORAGE_DTYPES[type_name.rsplit(".")[-1].removesuffix("Storage")])
    storage = storages.setdefault(key, Storage(dtype))
    if storage.dtype != dtype:
        raise ValueError("a storage with two dtypes")
    return storage


def _add(target: Any, items: list[Any]) -> Any:
    """Add items to a list, or alternating keys and values to a dict, and return it."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple or a huge integer could take forever.
            is_simple = isinstance(key, str | bytes | float | None) or (
                isinstance(key, int) and abs(key) <= MAX_INT
            )
            target[key if is_simple else Opaque("key")] = value
    elif not isinstance(target, Opaque):
        raise ValueError("items added to something other than a list or a dict")
    return target


def _call(function: Any, arguments: Any) -> Any:
    """Emulate a call: return a tensor or a dict if it makes one, or else a placeholder."""
    if not isinstance(function, Opaque) or not isinstance(arguments, tuple):
        raise ValueError("a call of something other than a function")
    # A pickle can pass the same long tuple a million times, so do not copy all of it.
    name, arguments = function.name.removeprefix("torch._utils."), arguments[:MAX_ARGUMENTS]
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
        return _call(arguments[0], arguments[2])
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, shape, strides, *rest = arguments
        type_name = rest.pop(2).name if name == "_rebuild_tensor_v3" else ""
        if isinstance(storage, Opaque) or any(rest[2:]):  # the conjugate or negative bit is set
            return Opaque("a view")
        return Tensor(storage, offset, shape, strides, type_name or str(storage.dtype))
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if name == "collections.OrderedDict" and not arguments:
        return {}
    return Opaque(name)

"""What `torch.save` wrote, read without PyTorch and without running anything.

Such a file holds a pickle, which is a program that makes objects, and the values of tensors next to
it. Here the program is followed without looking up one name in it: a tensor becomes its shape and
its place in the file, and an object of another class stays empty. So a file can neither run code
nor claim more than it holds.

Source: `torch.serialization` for the two forms of a file, `pickletools` for the pickle.
"""

import dataclasses
import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import short

MOST_PICKLE = 2 * 2**20  # bytes; a large model with its optimizer has a quarter of a MB
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # how files before PyTorch 1.6 begin
MOST_DIMENSIONS = 8
MOST_ARGUMENTS = 16  # of a call, and of what names a storage

# Names that a pickle may hold. None of them is ever looked up, but any other is worth an error.
KNOWN = re.compile(
    r"torch\.((cuda\.)?(sparse\.)?\w+|storage\.\w+|_utils\._rebuild_\w+|nn\.parameter\.Parameter)"
    r"|torch\.(_tensor\._rebuild_from_type_v2|serialization\._get_layout)"
    r"|torch\.nested\._internal\.nested_tensor\.\w+"
    r"|collections\.(Counter|OrderedDict)|argparse\.Namespace|_codecs\.encode"
    r"|builtins\.(set|complex|bytearray)"
)
LITERALS = (  # instructions that push their argument
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Unread("set"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TYPES = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "QInt8": np.int8,
    "QUInt8": np.uint8,
    "QInt32": np.int32,
    "QUInt4x2": np.uint8,
    "QUInt2x4": np.uint8,
    "Untyped": np.uint8,
}
# What following a broken pickle, or reading a broken archive, raises.
BROKEN = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclasses.dataclass(eq=False, repr=False)
class Unread:
    """A class, a function, or an object that one of them makes; only its name is known.

    `state` is the dict of its attributes, where the pickle has one.
    """

    name: str
    state: Any = None


@dataclasses.dataclass(eq=False, repr=False)
class Storage:
    """Values that tensors share; `position` and `size` in bytes are those in the file."""

    dtype: np.dtype
    position: int = 0
    size: int = 0
    values: np.ndarray | None = None  # as bytes, once they are read


@dataclasses.dataclass(eq=False, repr=False)
class Tensor:
    """A dense tensor in a file; `offset` and `strides` count elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    type_name: str  # of its elements, as numpy or PyTorch calls it

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or len(self.shape) > MOST_DIMENSIONS:
            raise ValueError("a tensor of no possible shape")
        if not isinstance(self.strides, tuple) or len(self.strides) != len(self.shape):
            raise ValueError("a tensor of no possible strides")
        sizes = (self.offset, *self.shape, *self.strides)
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("a tensor of no possible size")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, which may repeat those in the file."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self, file: io.BufferedIOBase) -> np.ndarray:
        """The values; tensors of one storage share their memory.

        Raises:
          ValueError: the file does not hold them.
        """
        storage = self.storage
        steps = [step if n > 1 else 0 for n, step in zip(self.shape, self.strides, strict=True)]
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, steps, strict=True))
        if (last + 1) * storage.dtype.itemsize > storage.size:
            raise ValueError("its values are not all in the file")
        if storage.values is None:
            values = np.empty(storage.size, np.uint8)
            file.seek(storage.position)
            if file.readinto(values.data) != storage.size:
                raise ValueError("its values are not all in the file")
            storage.values = values
        whole = storage.size // storage.dtype.itemsize * storage.dtype.itemsize
        values = storage.values[:whole].view(storage.dtype)[self.offset :]
        strides = [step * storage.dtype.itemsize for step in steps]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides)


class TorchFile(io.BufferedReader):
    """An open file that `torch.save` wrote; `content` is what was saved, tensors as `Tensor`.

    Raises:
      UserError: it is not such a file, is broken, or names a class that is not allowed.
    """

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.path = path
        self.storages: dict[str, Storage] = {}  # by their keys in the pickle
        try:
            self.length = self.seek(0, io.SEEK_END)
            self.seek(0)
            is_archive = self.peek(4)[:4] == b"PK\x03\x04"
            self.content = self._read_archive() if is_archive else self._read_legacy()
        except BaseException as error:
            self.close()
            if isinstance(error, BROKEN) and not isinstance(error, UserError):
                raise UserError(
                    f"{path} is no PyTorch checkpoint, or a broken or truncated one"
                ) from error
            raise

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `MOST_PICKLE` bytes: more is asked for by lengths that a file claims."""
        if size is not None and size > MOST_PICKLE:
            raise ValueError(f"{size} bytes at once")
        return super().read(size)

    def _read_archive(self) -> Any:
        members = self._members()
        (pickled,) = (name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name))
        root = pickled.removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")  # older files have none
        if order and self._read_member(order) == b"big":
            self._refuse("its numbers have their high byte first; save it on another machine")
        size = members[pickled].file_size
        if size > MOST_PICKLE:
            self._refuse(f"{pickled} has {size:,} bytes, expected at most {MOST_PICKLE:,}")
        content = self._follow(io.BytesIO(self._read_member(members[pickled])))
        for key, storage in self.storages.items():
            member = members[f"{root}data/{key}"]
            storage.position, storage.size = self._position(member), member.file_size
        return content

    def _members(self) -> dict[str, zipfile.ZipInfo]:
        """The archive's members by name, stored as they are and no larger than the file."""
        with zipfile.ZipFile(self) as archive:
            found = archive.infolist()
        members = {member.filename: member for member in found}
        if len(members) < len(found):
            self._refuse("two of its members have one name")
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                self._refuse(f"{short(name)} in it is compressed or encrypted")
        total = sum(member.file_size for member in found)
        if total > self.length:
            self._refuse(f"its members have {total:,} bytes, the file has {self.length:,}")
        return members

    def _refuse(self, reason: str) -> None:
        raise UserError(f"{self.path} is no archive that torch.save writes: {reason}")

    def _position(self, member: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind its name and extra field."""
        if member.header_offset < 0:
            raise ValueError("a member that is not in the file")
        self.seek(member.header_offset)
        name, extra = struct.unpack("<26xHH", self.read(30))
        return member.header_offset + 30 + name + extra

    def _read_member(self, member: zipfile.ZipInfo) -> bytes:
        self.seek(self._position(member))
        return self.read(member.file_size)

    def _read_legacy(self) -> Any:
        """The form before PyTorch 1.6: five pickles, and then the storages one after the other."""
        head = io.BytesIO(self.read(MOST_PICKLE))
        begin = tuple(self._follow(head) for _ in LEGACY)
        if begin != LEGACY:
            raise ValueError("no file of PyTorch's")
        if self._follow(head).get("little_endian") is False:
            self._refuse("its numbers have their high byte first; save it on another machine")
        content, keys = self._follow(head), self._follow(head)
        position = head.tell()
        for key in keys:
            storage = self.storages[key]
            self.seek(position)
            (count,) = struct.unpack("<q", self.read(8))
            storage.position, storage.size = position + 8, count * storage.dtype.itemsize
            position = storage.position + storage.size
            if count < 0 or position > self.length:
                raise ValueError("a storage that is not in the file")
        return content

    def _follow(self, pickled: io.BytesIO) -> Any:
        """Follow one pickle and return what it makes."""
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks under each mark
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(pickled):
            items: list[Any] = []
            if pickletools.markobject in opcode.stack_before:  # it takes all from the mark on
                items, stack = stack, below.pop()
            match opcode.name:
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case name if name in LITERALS:
                    stack.append(argument)
                case name if name in CONSTANTS:
                    stack.append(CONSTANTS[name])
                case name if name in EMPTY:
                    stack.append(EMPTY[name]())
                case "MARK":
                    below.append(stack)
                    stack = []
                case "POP":
                    stack.pop()
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(argument)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(argument)])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(items))
                case "LIST":
                    stack.append(items)
                case "DICT":
                    stack.append(_fill({}, items))
                case "FROZENSET":
                    stack.append(Unread("frozenset"))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _fill(stack[-1], [key, value])
                case "SETITEMS":
                    _fill(stack[-1], items)
                case "GLOBAL" | "INST":
                    stack.append(self._name(*argument.split(" ")))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._name(module, name))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_make(function, arguments))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Unread):
                        stack[-1].state = state
                case unknown:
                    raise ValueError(f"the instruction {unknown}")
        return stack.pop()

    def _name(self, module: Any, name: Any) -> Unread:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if not KNOWN.fullmatch(full):
            raise UserError(
                f"{self.path} needs {full[:80]} to be read, and only tensors and "
                "argparse.Namespace are allowed; nothing of it was run"
            )
        return Unread(full)

    def _storage(self, saved: Any) -> Storage | Unread:
        """What ('storage', type, key, device, count) names; in old files a view may follow."""
        if not isinstance(saved, tuple) or len(saved) > MOST_ARGUMENTS:
            raise ValueError("a reference to what is no storage")
        tag, kind, key, _, _, *view = saved
        if tag != "storage" or not isinstance(key, str):
            raise ValueError("a reference to what is no storage")
        if any(part is not None for part in view):
            return Unread("a view of a storage")
        dtype = np.dtype(TYPES[kind.name.rsplit(".")[-1].removesuffix("Storage")])
        storage = self.storages.setdefault(key, Storage(dtype))
        if storage.dtype != dtype:
            raise ValueError("a storage of two types")
        return storage


def _fill(target: Any, items: list[Any]) -> Any:
    """`target`, a dict, with keys and values in turn."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a nested tuple, or of long integers, could take forever.
            simple = isinstance(key, str | bytes | float | None) or (
                isinstance(key, int) and abs(key) < 2**63
            )
            target[key if simple else Unread("key")] = value
    elif not isinstance(target, Unread):
        raise ValueError("items of what is no dict")
    return target


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Unread):
        raise ValueError("items of what is no list")


def _make(function: Any, arguments: Any) -> Any:
    """What a call makes, if it is a tensor or a dict; else an object without content."""
    name, arguments = _call(function, arguments)
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
        name, arguments = _call(arguments[0], arguments[2])
    name = name.removeprefix("torch._utils.")
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, shape, strides, *rest = arguments
        typed = rest.pop(2).name if name == "_rebuild_tensor_v3" else ""
        if isinstance(storage, Unread) or any(rest[2:]):  # conjugate or negative
            return Unread("a view")
        return Tensor(storage, offset, shape, strides, typed or str(storage.dtype))
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if name == "collections.OrderedDict" and not arguments:
        return {}
    return Unread(name)


def _call(function: Any, arguments: Any) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(function, Unread) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    # A pickle can name one long tuple a million times.
    return function.name, arguments if len(arguments) <= MOST_ARGUMENTS else ()

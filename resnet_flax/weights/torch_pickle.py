"""Reads files of torch.save, without torch, and without running code from them.

A pickle is a program: loading one may call any function. This reader replaces the few names that
tensors and plain containers need by its own functions, and refuses all others.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from resnet_flax.errors import UserError

# Marks the format before torch 1.6, a sequence of pickles and storages.
_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# Types that a checkpoint may contain besides tensors; they are replaced by their names.
_NAMES = (
    *("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "bool", "complex64", "complex128", "strided", "channels_last"),
    *_DTYPES,
)

# A state dictionary's arrays may be views of shared storages; copies are limited to so many times
# the file's size.
_COPIES = 4


class _Storage:
    """Memory that tensors are views of; filled once its bytes are read."""

    def __init__(self, dtype: Any, size: int) -> None:
        self.dtype, self.size = np.dtype(dtype), size
        self.values: np.ndarray | None = None


class Tensor:
    """A tensor in the object that was read, until `array` copies it.

    Attributes:
      nbytes: of the copy.
    """

    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any) -> None:
        self._storage, self._offset = storage, offset
        self._shape, self._strides = tuple(shape), tuple(strides)
        numbers = (self._offset, *self._shape, *self._strides)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("an invalid tensor")
        if len(self._shape) != len(self._strides):
            raise ValueError("a tensor with different numbers of strides and axes")
        self.nbytes = math.prod(self._shape) * storage.dtype.itemsize

    def array(self) -> np.ndarray:
        """A copy of the elements as an array."""
        values = self._storage.values
        if values is None:
            raise ValueError("a tensor without data")
        if self.nbytes == 0:
            return np.zeros(self._shape, values.dtype)
        # Views are of raw memory, so they must lie inside it.
        last = self._offset + sum(
            (n - 1) * stride for n, stride in zip(self._shape, self._strides, strict=True)
        )
        if last >= len(values):
            raise ValueError("a tensor that reaches beyond its storage")
        itemsize = values.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[self._offset :], self._shape, [stride * itemsize for stride in self._strides]
        )
        return view.copy()


class Read(NamedTuple):
    """The contents of a file.

    Attributes:
      tree: the object, with `Tensor`s in place of tensors.
      budget: total bytes that arrays copied from it may take.
    """

    tree: Any
    budget: int

    def arrays(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Tensors of the tree as arrays."""
        if sum(tensor.nbytes for tensor in tensors.values()) > self.budget:
            raise ValueError("tensors that view the same memory many times")
        return {name: tensor.array() for name, tensor in tensors.items()}


class _Unpickler(pickle.Unpickler):
    """Admits tensors and plain containers."""

    def __init__(self, program: bytes, name: str, storage: Callable[[Any], _Storage]) -> None:
        super().__init__(io.BytesIO(program), encoding="utf-8")
        self._name, self._storage = name, storage

        # Defined for each file, so that a pickle can only modify its own.
        def rebuild(storage: Any, offset: int, size: Any, stride: Any, *more: Any) -> Tensor:
            if not isinstance(storage, _Storage) or any(more[2:]):  # conjugate, negative
                raise ValueError("a tensor of an unknown kind")
            return Tensor(storage, offset, size, stride)

        def first(value: Any = (), *_: Any) -> Any:
            return value

        def encoded(text: Any, *_: Any) -> bytes:
            return str(text).encode("latin1")

        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("collections", "Counter"): collections.Counter,
            ("builtins", "set"): set,
            ("builtins", "complex"): complex,
            ("_codecs", "encode"): encoded,
            ("torch", "Size"): first,
            ("torch", "device"): first,
            ("torch._utils", "_rebuild_tensor"): rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            **{("torch", kind): kind for kind in _NAMES},
        }

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in self._known:
            raise UserError(
                f"{self._name} tries to run {module}.{name}, which no weights need; nothing was "
                "run: use a file of tensors only (a safetensors file, or torch.save of a "
                "state_dict)"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return self._storage(pid)


def read_zip(path: Path) -> Read:
    """The object in a file of torch 1.6 or newer.

    Raises:
      UserError: it has more than tensors and plain containers.
      Exception: of any type if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = next(n for n in names if n.endswith("/data.pkl")).removesuffix("data.pkl")
        storages: dict[str, _Storage] = {}

        def member(name: str) -> bytes:
            # Must be uncompressed, as torch writes it, so it cannot be larger than the file.
            info = archive.getinfo(f"{folder}{name}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            return archive.read(info)

        if f"{folder}byteorder" in names and member("byteorder") != b"little":
            raise ValueError("big-endian numbers")

        def storage(pid: Any) -> _Storage:
            kind, key, size = _parse(pid)
            if key not in storages:
                storages[key] = _Storage(_DTYPES[kind], size)
                _fill(storages[key], member(f"data/{key}"))
            return storages[key]

        program = _program(io.BytesIO(member("data.pkl")))
        return Read(_Unpickler(program, str(path), storage).load(), _budget(path))


def read_legacy(path: Path) -> Read:
    """The object in a file of torch before 1.6; see `read_zip`."""
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        kind, key, size = _parse(pid)
        return storages.setdefault(key, _Storage(_DTYPES[kind], size))

    def none(pid: Any) -> _Storage:
        raise ValueError("an unexpected storage")

    with path.open("rb") as file:

        def load(find: Callable[[Any], _Storage] = none) -> Any:
            return _Unpickler(_program(file), str(path), find).load()

        if load() != _MAGIC:
            raise UserError(f"{path} is a pickle, but not from torch.save; give a file of weights")
        load()  # version of the protocol
        if load().get("little_endian") is not True:
            raise ValueError("big-endian numbers")
        found = load(storage)
        end = path.stat().st_size
        for key in load():
            (size,) = struct.unpack("<q", file.read(8))
            wanted = storages[key].dtype.itemsize * storages[key].size
            if size != storages[key].size or wanted > end - file.tell():
                raise ValueError("a storage is truncated")
            _fill(storages[key], file.read(wanted))
    return Read(found, _budget(path))


def _budget(path: Path) -> int:
    return _COPIES * path.stat().st_size + 2**20


def _program(file: io.BufferedIOBase) -> bytes:
    """The next pickle of a file; refuses one that would allocate more memory than it fills.

    The unpickler allocates a memo up to the largest index that a pickle uses.
    """
    start = file.tell()
    operations: Any = pickletools.genops(file)  # type: ignore[arg-type]
    numbers = [int(arg) for code, arg, _ in operations if "PUT" in code.name]
    end = file.tell()
    if max(numbers, default=0) > end - start:
        raise ValueError("a pickle with too large a memo index")
    file.seek(start)
    return file.read(end - start)


def _parse(pid: Any) -> tuple[str, str, int]:
    """Type, key and number of elements of a storage in a pickle."""
    word, kind, key, _, size, *view = pid
    if word != "storage" or kind not in _DTYPES or type(size) is not int or any(view):
        raise ValueError("a storage of an unknown kind")
    return kind, str(key), size


def _fill(storage: _Storage, data: bytes) -> None:
    values = np.frombuffer(data, storage.dtype)
    if len(values) != storage.size:
        raise ValueError("a storage has another size than declared")
    storage.values = values

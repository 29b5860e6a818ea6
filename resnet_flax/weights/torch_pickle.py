"""Reads what torch.save wrote, without torch, and without running anything that it asks for.

A pickle is a program: loading one may call any function. This reader knows the few names that
tensors and plain containers need, has its own functions for them, and refuses all others.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from resnet_flax.errors import UserError

# Of the format before torch 1.6, in which pickles and storages follow one another.
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


class _Storage:
    """A run of numbers that tensors are views of; filled once its bytes are read."""

    def __init__(self, dtype: Any, size: int) -> None:
        self.dtype, self.size = np.dtype(dtype), size
        self.values: np.ndarray | None = None


class _Tensor:
    """What a tensor will be once its storage is filled."""

    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any) -> None:
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        values = self.storage.values
        numbers = (self.offset, *self.shape, *self.strides)
        if values is None or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor that is none")
        if len(self.shape) != len(self.strides):
            raise ValueError("a tensor with other strides than axes")
        # Views are made of raw memory: nothing may lie outside of it, or be there many times.
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, values.dtype)
        last = self.offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        if last >= len(values) or math.prod(self.shape) > len(values):
            raise ValueError("a tensor that reaches beyond its storage")
        itemsize = values.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, [stride * itemsize for stride in self.strides]
        )
        return view.copy()


class _Unpickler(pickle.Unpickler):
    """Admits tensors and plain containers."""

    def __init__(
        self, file: io.BufferedIOBase, name: str, storage: Callable[[Any], _Storage]
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._name, self._storage = name, storage

        # Made anew for each file: what a pickle may do to them, it does to its own.
        def rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor without a storage")
            return _Tensor(storage, offset, size, stride)

        def parameter(tensor: Any, *_: Any) -> Any:
            return tensor

        def size(numbers: Any = ()) -> tuple:
            return tuple(numbers)

        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): size,
            ("torch._utils", "_rebuild_tensor"): rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_parameter"): parameter,
            **{("torch", kind): kind for kind in _DTYPES},  # names, to be looked up only
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise UserError(
                f"{self._name} asks to run {module}.{name}, which no weights need; nothing was "
                "run: use a file of tensors only (a safetensors file, or torch.save of a "
                "state_dict)"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return self._storage(pid)


def read_zip(path: Path) -> Any:
    """The object in a file of torch 1.6 or newer, with arrays in the place of tensors.

    Raises:
      UserError: it asks for more than tensors and plain containers.
      Exception: of all kinds where it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = next(n for n in names if n.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers in big-endian order")
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            kind, key, size = _parse(pid)
            if key not in storages:
                storages[key] = _Storage(_DTYPES[kind], size)
                # Not compressed, so a file cannot hold more than its own size.
                info = archive.getinfo(f"{folder}data/{key}")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("a compressed storage")
                _fill(storages[key], archive.read(info))
            return storages[key]

        program = io.BytesIO(archive.read(f"{folder}data.pkl"))
        return _arrays(_Unpickler(program, str(path), storage).load())


def read_legacy(path: Path) -> Any:
    """The object in a file of torch before 1.6; see `read_zip`."""
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        kind, key, size = _parse(pid)
        return storages.setdefault(key, _Storage(_DTYPES[kind], size))

    def none(pid: Any) -> _Storage:
        raise ValueError("a storage where none belongs")

    with path.open("rb") as file:

        def load(find: Callable[[Any], _Storage] = none) -> Any:
            return _Unpickler(file, str(path), find).load()

        if load() != _MAGIC:
            raise UserError(f"{path} is a pickle, but none that torch.save wrote; use weights")
        load()  # version of the protocol
        if load().get("little_endian") is not True:
            raise ValueError("numbers in big-endian order")
        found = load(storage)
        end = path.stat().st_size
        for key in load():
            (size,) = struct.unpack("<q", file.read(8))
            wanted = storages[key].dtype.itemsize * storages[key].size
            if size != storages[key].size or wanted > end - file.tell():
                raise ValueError("a storage is cut off")
            _fill(storages[key], file.read(wanted))
    return _arrays(found)


def _parse(pid: Any) -> tuple[str, str, int]:
    """Type, key and number of elements of the storage that a pickle names."""
    word, kind, key, _, size, *view = pid
    if word != "storage" or kind not in _DTYPES or type(size) is not int or any(view):
        raise ValueError("a storage of an unknown kind")
    return kind, str(key), size


def _fill(storage: _Storage, data: bytes) -> None:
    values = np.frombuffer(data, storage.dtype)
    if len(values) != storage.size:
        raise ValueError("a storage is of another size than it says")
    storage.values = values


def _arrays(tree: Any) -> Any:
    """A tree of plain containers, with arrays in the place of tensors."""
    if isinstance(tree, _Tensor):
        return tree.array()
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_arrays(value) for value in tree]
    return tree

"""Writes files as torch.save does, without torch, from what a test puts together."""

import collections
import io
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.weights.torch_pickle import _MAGIC


class Name(NamedTuple):
    """A function or class of a module that need not be installed."""

    module: str
    name: str

    def __call__(self) -> None:
        """As pickle asks that what makes an object can be called."""


class Made(NamedTuple):
    """An object that a pickle makes by calling something, with attributes if it has any."""

    by: Any
    arguments: tuple[Any, ...] = ()
    attributes: Any = None


class Tensor(NamedTuple):
    """A tensor with these elements; float8 and its like are saved as newer torch does."""

    array: np.ndarray


class _Storage(NamedTuple):
    kind: Name
    key: str
    size: int


_KINDS = {"float32": "Float", "float64": "Double", "int64": "Long", "uint8": "Byte"}


class _Pickler(pickle._Pickler):
    """Python's own pickler, whose opcodes can be added to."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[str, np.ndarray] = {}

    def _save_name(self, name: Name) -> None:
        self.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())

    dispatch[Name] = _save_name

    def persistent_id(self, thing: Any) -> Any:
        return ("storage", *thing[:2], "cpu", thing.size) if isinstance(thing, _Storage) else None

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, Made):
            return tuple(thing)
        if not isinstance(thing, Tensor):
            return NotImplemented
        array, key = np.array(thing.array, order="C"), str(len(self.storages))
        self.storages[key] = array
        strides = tuple(stride // array.itemsize for stride in array.strides)
        view = (0, thing.array.shape, strides, False, collections.OrderedDict())
        if array.dtype.name in _KINDS:
            storage = _Storage(Name("torch", f"{_KINDS[array.dtype.name]}Storage"), key, array.size)
            return Name("torch._utils", "_rebuild_tensor_v2"), (storage, *view)
        storage = _Storage(Name("torch.storage", "UntypedStorage"), key, array.nbytes)
        dtype = Name("torch", array.dtype.name)
        return Name("torch._utils", "_rebuild_tensor_v3"), (storage, *view, dtype)


def _pickled(tree: Any, protocol: int) -> tuple[bytes, dict[str, np.ndarray]]:
    file = io.BytesIO()
    pickler = _Pickler(file, protocol)
    pickler.dump(tree)
    return file.getvalue(), pickler.storages


def zip_file(tree: Any, protocol: int = 2) -> bytes:
    """As torch saves since 1.6."""
    program, storages = _pickled(tree, protocol)
    return zip_of(program, {f"data/{key}": array.tobytes() for key, array in storages.items()})


def zip_of(program: bytes, members: dict[str, bytes] | None = None) -> bytes:
    """A file of torch with any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        members = {"data.pkl": program, "byteorder": b"little", **(members or {})}
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)
    return file.getvalue()


def legacy_file(tree: Any, protocol: int = 2) -> bytes:
    """As torch saved before 1.6."""
    program, storages = _pickled(tree, protocol)
    data = pickle.dumps(list(storages), protocol=2)
    sizes = {
        key: array.size if array.dtype.name in _KINDS else array.nbytes
        for key, array in storages.items()
    }
    parts = (struct.pack("<q", sizes[key]) + array.tobytes() for key, array in storages.items())
    return legacy_of(program) + data + b"".join(parts)


def legacy_of(program: bytes) -> bytes:
    """The beginning of a legacy file, with any pickle."""
    head = [_MAGIC, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, protocol=2) for part in head) + program

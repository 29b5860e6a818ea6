"""Reads files of torch.save, without torch, and without running code from them.

A pickle is a program: loading one may call any function. This reader looks up no name that a pickle
asks for: tensors and plain containers are made by its own functions, and stand-ins that do nothing
take the place of all other objects, such as the settings, schedules and random states that training
programs save. What is there to run code is not needed by weights; a file that has it is refused.
"""

import collections
import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_flax.errors import UserError
from resnet_flax.weights.torch_tensors import (
    DTYPES,
    STORAGES,
    Read,
    StandIn,
    Storage,
    Tensor,
    Unread,
)

# Marks the format before torch 1.6, a sequence of pickles and storages.
_MAGIC = 0x1950A86A20F9469CFC6C

# A state dictionary's arrays may be views of shared storages; copies are limited to so many times
# the file's size.
_COPIES = 4

# Stand-ins are classes, which take much more memory than their names in the file.
_MOST_KINDS = 1000

# Modules whose functions run programs or change the machine. They are not looked up, as nothing is;
# but a file that asks for them is no file of weights.
_RUNNING = (
    *("os", "posix", "nt", "subprocess", "_posixsubprocess", "sys", "shutil", "socket"),
    *("importlib", "runpy", "pty", "ctypes"),
)

# What checkpoints have of Python's own module, by the names of Python 2 and 3.
_BUILTIN = (
    *("int", "long", "float", "complex", "bool", "str", "unicode", "bytes", "bytearray", "list"),
    *("dict", "tuple", "slice", "range", "xrange", "object", "type", "Ellipsis"),
)


class _Function:
    """What a pickle calls. Unlike a `functools.partial`, the pickle cannot change its state."""

    __slots__ = ("func",)

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, *arguments: Any) -> Any:
        return self.func(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise ValueError("a function that the pickle changes")


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor | Unread:
    if not isinstance(storage, Storage):
        return Unread("a view of something else")
    if any(more[2:]):
        return Unread("conjugate or negative view")
    return Tensor(storage, offset, size, stride)


def _rebuild_untyped(*arguments: Any) -> Tensor | Unread:
    storage, offset, size, stride, _, _, dtype, *more = arguments
    if not isinstance(storage, Storage) or not isinstance(dtype, str):
        return Unread(getattr(dtype, "kind", "a tensor of an unknown type"))
    if any(more):
        return Unread("conjugate or negative view")
    return Tensor(storage, offset, size, stride, DTYPES[dtype])


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    is_ours = isinstance(function, _Function) and function.func in (_rebuild, _rebuild_untyped)
    return function(*arguments) if is_ours else Unread("a tensor of a type of its own")


def _first(value: Any = (), *_: Any) -> Any:
    return value


def _encoded(text: Any, *_: Any) -> bytes:
    # The text of another object could be far longer than the file.
    if not isinstance(text, str):
        raise TypeError("bytes of something else than text")
    return text.encode("latin1")


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "defaultdict"): _empty,
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _first,
    ("torch", "device"): _first,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}

_VALUES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    **{("torch", name): name for name in (*DTYPES, *STORAGES)},
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
}


class _Unpickler(pickle.Unpickler):
    """Makes tensors, plain containers and stand-ins, and imports nothing."""

    def __init__(self, program: bytes, name: str, storage: Callable[[Any], Storage]) -> None:
        # Latin-1 also decodes the byte strings of Python 2.
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._name, self._storage = name, storage
        # A pickle can modify what it gets, so it gets objects of its own.
        functions = {**_FUNCTIONS, ("builtins", "getattr"): self._attribute}
        self._known: dict[tuple[str, str], Any] = {
            **_VALUES,
            **{name: _Function(function) for name, function in functions.items()},
        }

    def _refuse(self, function: str) -> None:
        raise UserError(
            f"{self._name} tries to run {function}, which no weights need; nothing was run: use a "
            "file of tensors only (a safetensors file, or torch.save of a state_dict)"
        )

    def _attribute(self, of: Any, *_: Any) -> Any:
        """Members of an enum, and classes in classes; a stand-in is all of its attributes."""
        if not (isinstance(of, type) and issubclass(of, StandIn)):
            self._refuse("builtins.getattr")
        return of

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in self._known:
            return self._known[module, name]
        is_builtin = module == "builtins" and name not in _BUILTIN
        if is_builtin or module.partition(".")[0] in _RUNNING:
            self._refuse(f"{module}.{name}")
        if len(self._known) > _MOST_KINDS:
            raise ValueError("more kinds of objects than a checkpoint has")
        stand_in: Any = type("StandIn", (StandIn,), {"kind": f"{module}.{name}"})
        if module.startswith("torch.") and name.startswith("_rebuild_"):
            stand_in = _Function(lambda *_: Unread(name.removeprefix("_rebuild_")))
        return self._known.setdefault((module, name), stand_in)

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the class of a network, and its source
            return pid[1]
        return self._storage(pid)


def read_zip(path: Path) -> Read:
    """The object in a file of torch 1.6 or newer.

    Raises:
      UserError: it tries to run code.
      Exception: of any type if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = next(n for n in names if n.endswith("/data.pkl")).removesuffix("data.pkl")
        storages: dict[str, Storage] = {}

        def member(name: str) -> bytes:
            # Must be uncompressed, as torch writes it, so it cannot be larger than the file.
            info = archive.getinfo(f"{folder}{name}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            return archive.read(info)

        if f"{folder}byteorder" in names and member("byteorder") != b"little":
            raise ValueError("big-endian numbers")

        def storage(pid: Any) -> Storage:
            kind, key, size = _parse(pid)
            if key not in storages:
                storages[key] = Storage(DTYPES[STORAGES[kind]], size)
                storages[key].fill(member(f"data/{key}"))
            return storages[key]

        program = _program(io.BytesIO(member("data.pkl")))
        found = _Unpickler(program, str(path), storage).load()
        return Read(found, _budget(path), str(path))


def read_legacy(path: Path) -> Read:
    """The object in a file of torch before 1.6; see `read_zip`."""
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, key, size = _parse(pid)
        return storages.setdefault(key, Storage(DTYPES[STORAGES[kind]], size))

    def none(pid: Any) -> Storage:
        raise ValueError("an unexpected storage")

    with path.open("rb") as file:

        def load(find: Callable[[Any], Storage] = none) -> Any:
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
            storages[key].fill(file.read(wanted))
    return Read(found, _budget(path), str(path))


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
    if word != "storage" or kind not in STORAGES or type(size) is not int or any(view):
        raise ValueError("a storage of an unknown kind")
    if type(key) not in (str, int):
        raise TypeError("a storage without a name")
    return kind, str(key), size

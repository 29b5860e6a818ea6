"""What a pickle of torch becomes: tensors, and stand-ins that do nothing for other objects."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 -- registers bfloat16 and the float8 types with NumPy
import numpy as np

from resnet_flax.errors import UserError, listed
from resnet_flax.weights.contents import Node

# The types of tensors, which NumPy calls as torch does.
DTYPES = {
    name: np.dtype(name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}

# The types of elements of torch's storages; those of newer types are untyped.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "UntypedStorage": "uint8",
}

# Where a network that was saved as an object has its arrays.
_ATTRIBUTES = ("_parameters", "_buffers", "_modules")

# Keys of an optimizer's state, such as "optim" and "optimizer_state", but not "optimal_model".
_OPTIMIZER = re.compile(r"optim(?!al)")


class Storage:
    """Memory that tensors are views of; filled once its bytes are read."""

    def __init__(self, dtype: np.dtype, size: int) -> None:
        self.dtype, self.size = dtype, size
        self._values: np.ndarray | None = None

    def __setstate__(self, _: Any) -> None:
        raise ValueError("a storage that the pickle changes")

    def fill(self, data: bytes) -> None:
        """Gives it its bytes, which must be as many as declared."""
        values = np.frombuffer(data, self.dtype)
        if len(values) != self.size:
            raise ValueError("a storage has another size than declared")
        self._values = values

    def values(self, dtype: np.dtype) -> np.ndarray:
        """Its elements as another type."""
        if self._values is None:
            raise ValueError("a tensor without data")
        return self._values.view(dtype)


class Tensor:
    """A tensor in the object that was read, until `array` copies it.

    Attributes:
      shape: of the tensor.
      nbytes: of the copy.
    """

    def __init__(
        self, storage: Storage, offset: int, shape: Any, strides: Any, dtype: np.dtype | None = None
    ) -> None:
        self._storage, self._offset = storage, offset
        self._dtype = storage.dtype if dtype is None else dtype
        self.shape, self._strides = tuple(shape), tuple(strides)
        numbers = (self._offset, *self.shape, *self._strides)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("an invalid tensor")
        if len(self.shape) != len(self._strides):
            raise ValueError("a tensor with different numbers of strides and axes")
        self.nbytes = math.prod(self.shape) * self._dtype.itemsize

    def __setstate__(self, _: Any) -> None:  # as it would undo these checks
        raise ValueError("a tensor that the pickle changes")

    def array(self) -> np.ndarray:
        """A copy of the elements as an array."""
        values = self._storage.values(self._dtype)
        if self.nbytes == 0:
            return np.zeros(self.shape, values.dtype)
        # Views are of raw memory, so they must lie inside it.
        last = self._offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self._strides, strict=True)
        )
        if last >= len(values):
            raise ValueError("a tensor that reaches beyond its storage")
        itemsize = values.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            values[self._offset :].view(f"V{itemsize}"),  # it does not know the types of ml_dtypes
            self.shape,
            [stride * itemsize for stride in self._strides],
        )
        return view.copy().view(self._dtype)


class Unread(NamedTuple):
    """A tensor of a kind that is not read, such as a sparse or quantized one.

    Attributes:
      kind: torch's name for it.
      shape: unknown; not that of a scalar, which may be left out.
    """

    kind: str
    shape: tuple[int, ...] = (0,)


class StandIn(dict[Any, Any]):
    """Takes the place of any object that is no tensor.

    It ignores what it is called with, and keeps items and attributes, in which a state dictionary
    may be: the pickle can fill it, but nothing of the object's own code is there to be run.

    Attributes:
      kind: the name of the object's class.
    """

    kind = ""
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: Any) -> None:
        for attributes in state if isinstance(state, tuple) else (state,):
            if isinstance(attributes, dict):
                self.update(attributes)

    def append(self, *_: Any) -> None:
        """Takes an element of what derives from a list, or of a set, and drops it."""

    extend = add = append


class Read(NamedTuple):
    """The contents of a file.

    Attributes:
      tree: the object, with `Tensor`s in place of tensors.
      budget: total bytes that arrays copied from it may take.
      origin: of the file, for errors.
    """

    tree: Any
    budget: int
    origin: str

    def nodes(self) -> list[Node]:
        """Its dictionaries of tensors, without those of optimizers; each object once."""
        found = [Node(path, dict(tensors)) for path, tensors in _nodes(self.tree, "", set())]
        return [node for node in found if node.tensors]

    def kind(self) -> str:
        """What it is, in words, if it is no state dictionary."""
        if isinstance(self.tree, StandIn):
            return f"an object of the class {self.tree.kind}"
        if isinstance(self.tree, dict):
            keys = [key for key in self.tree if isinstance(key, str)]
            return f"a dictionary without tensors, of {listed(keys) or 'nothing'}"
        is_tensor = isinstance(self.tree, Tensor | Unread)
        return "a tensor without a name" if is_tensor else f"a {type(self.tree).__name__}"

    def arrays(self, tensors: Mapping[str, Tensor | Unread]) -> dict[str, np.ndarray]:
        """Tensors of the tree as arrays."""
        unread = {n: t.kind for n, t in tensors.items() if isinstance(t, Unread)}
        if unread:
            raise UserError(
                f"{self.origin} has tensors of a kind that is not read ({listed(unread)}: "
                f"{listed(set(unread.values()))}); save the state_dict of a network with dense "
                "floating-point weights"
            )
        whole = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
        if sum(tensor.nbytes for tensor in whole.values()) > self.budget:
            raise ValueError("tensors that view the same memory many times")
        return {name: tensor.array() for name, tensor in whole.items()}


Items = list[tuple[str, Tensor | Unread]]


def _nodes(tree: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Items]]:
    """Walks nested dictionaries. A network that is an object is one node."""
    if not isinstance(tree, dict) or id(tree) in seen:
        return
    seen.add(id(tree))
    yield path, list(_tensors(tree, "", seen))
    for key, value in tree.items():
        if isinstance(key, str) and key not in _ATTRIBUTES and not _OPTIMIZER.search(key):
            yield from _nodes(value, f"{path}.{key}".lstrip("."), seen)


def _tensors(tree: dict[Any, Any], prefix: str, seen: set[int]) -> Iterator[Any]:
    """The tensors of a dictionary by name, and those inside of a network that is an object."""
    is_object = isinstance(tree, StandIn)
    inside = [tree[name] for name in _ATTRIBUTES if isinstance(tree.get(name), dict)]
    for part in inside if is_object and inside else [tree]:
        for key, value in part.items():
            if not isinstance(key, str | int):  # others can have far longer texts than the file
                continue
            if isinstance(value, Tensor | Unread):
                yield f"{prefix}{key}", value
            elif is_object and isinstance(value, StandIn) and id(value) not in seen:
                seen.add(id(value))
                yield from _tensors(value, f"{prefix}{key}.", seen)

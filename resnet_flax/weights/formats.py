"""Reads a file of arrays in any format of weights, and which of its arrays are together."""

import contextlib
import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from resnet_flax.errors import UserError, first_line, listed
from resnet_flax.weights import caffe, torch_pickle
from resnet_flax.weights.contents import Node
from resnet_flax.weights.foreign import archive_kind, file_kind
from resnet_flax.weights.torch_tensors import DTYPES

Arrays = dict[str, np.ndarray]

# The key of safetensors' metadata for this package's description.
ABOUT = "resnet_flax"

# The types of floating-point numbers that safetensors gives as NumPy's, and others.
_FLOATS = ("F16", "F32", "F64")
_FLOAT8 = {
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E4M3FNUZ": DTYPES["float8_e4m3fnuz"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "F8_E5M2FNUZ": DTYPES["float8_e5m2fnuz"],
    "F8_E8M0": DTYPES["float8_e8m0fnu"],
}


class Contents(NamedTuple):
    """What is in a file.

    Attributes:
      nodes: the dictionaries of tensors.
      arrays: reads tensors of a node.
      about: this package's description, not verified; empty if another program wrote the file.
      caffe: whether it is a Caffe model.
    """

    nodes: list[Node]
    arrays: Callable[[dict[str, Any]], Arrays]
    about: Any = {}
    caffe: bool = False


def read_file(path: Path) -> tuple[Contents, str]:
    """What is in a file, and its SHA-256.

    Raises:
      UserError: it is of no format of weights, is damaged, or asks to run code.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; give a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    _refuse_what_is_none(path, head)
    with damage_explained(path):
        return _read(path, head), digest


@contextlib.contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """A context in which an error means that a file is damaged: those of readers are of all types.

    Raises:
      UserError: instead of any other error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged or truncated ({first_line(error)}); download it again"
        ) from error


def _refuse_what_is_none(path: Path, head: bytes) -> None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty; download it again")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise UserError(
            f"{path} is a web page, not weights: its address leads to a page about the file; "
            "download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a pointer of Git LFS, not weights: get the file itself by `git lfs pull`"
        )


def _read(path: Path, head: bytes) -> Contents:
    if head[8:9] == b"{":  # after its length, which can be any bytes
        arrays, about = _read_safetensors(path)
        return Contents([Node("", arrays)], dict, about)
    if head.startswith(b"\x80") or _is_torch_zip(path, head):
        read = (torch_pickle.read_legacy if head[:1] == b"\x80" else torch_pickle.read_zip)(path)
        nodes = read.nodes()
        if not nodes:
            raise UserError(
                f"{path} has no state dictionary of tensors, but {read.kind()}; give a file of "
                "weights, such as torch.save of a state_dict"
            )
        return Contents(nodes, read.arrays)
    if head.startswith(b"PK"):
        arrays = _read_npz(path)
        layers = caffe.layers_of(arrays)
    elif path.suffix == ".caffemodel":
        arrays, layers = {}, caffe.read_caffemodel(path.read_bytes())
    else:
        kind = file_kind(path, head)
        if path.suffix == ".safetensors" and not kind:
            raise ValueError("it has no header")
        raise UserError(_is_not(path, kind))
    if layers is None:
        return Contents([Node("", arrays)], dict)
    return Contents([Node("", caffe.to_torchvision(layers))], dict, caffe=True)


def _is_torch_zip(path: Path, head: bytes) -> bool:
    return head.startswith(b"PK") and any(n.endswith("/data.pkl") for n in _members(path))


def _members(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _is_not(path: Path, kind: str) -> str:
    is_other = f"is {kind}, not" if kind else "is not"
    return (
        f"{path} {is_other} a weights file; expected .safetensors, .pth, .th, .caffemodel or .npz"
    )


def _read_npz(path: Path) -> Arrays:
    names = _members(path)
    if not names or not all(name.endswith(".npy") for name in names):
        raise UserError(_is_not(path, archive_kind(names)))
    with np.load(path, allow_pickle=False) as stored:
        arrays = {}
        for name in stored.files:
            try:
                arrays[name] = stored[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise UserError(
                    f"{path} has Python objects in {name}, which only running code could read; "
                    "save arrays of numbers"
                ) from error
    return arrays


def _read_safetensors(path: Path) -> tuple[Arrays, Any]:
    """Its arrays, and this package's description of them."""
    with safetensors.safe_open(path, "np") as file:
        about = (file.metadata() or {}).get(ABOUT, "{}")
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        unread = {n: t for n, t in types.items() if t[0] == "F" and t not in _FLOATS}
        arrays = {name: file.get_tensor(name) for name in types if name not in unread}
    return arrays | _read_float8(path, unread), json.loads(about)


def _read_float8(path: Path, types: dict[str, str]) -> Arrays:
    """Arrays of types that safetensors does not give as NumPy's; it has checked the header."""
    if not types:
        return {}
    unknown = sorted(set(types.values()) - set(_FLOAT8))
    if unknown:
        raise UserError(
            f"{path} has tensors of the type {listed(unknown)} ({listed(types)}), which is not "
            "read; save them as float32"
        )
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    arrays = {}
    for name, dtype in types.items():
        (start, _), shape = header[name]["data_offsets"], header[name]["shape"]
        values = np.fromfile(path, _FLOAT8[dtype], math.prod(shape), offset=8 + size + start)
        arrays[name] = values.reshape(shape)
    return arrays

"""Reads weights files of all formats, as arrays by torch's names."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from resnet_flax.errors import UserError, first_line
from resnet_flax.runtime import storage
from resnet_flax.weights import caffe, programs, torch_pickle

Arrays = dict[str, np.ndarray]

# Keys under which training programs save the state dictionary.
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "network")

# Keys to use if there are no others.
_AVERAGES = ("state_dict_ema", "model_ema", "ema")

# Prefixes that wrappers add to all names of a network.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

# How names of indices of the Hugging Face hub end.
INDEX = ".index.json"

# The key of safetensors' metadata for this package's description.
ABOUT = "resnet_flax"


class WeightsFile(NamedTuple):
    """The contents of a weights file.

    Attributes:
      arrays: by their names in torch, as in the file.
      about: this package's description of them, not verified; empty if another program wrote the
        file.
      sha256: of the file.
      caffe: whether it is a Caffe model.
      function: attributes of the network that its program decides, whatever the shapes.
    """

    arrays: Arrays
    about: Any
    sha256: str
    caffe: bool = False
    function: Mapping[str, Any] = {}


def read_weights(path: str | Path) -> WeightsFile:
    """Reads safetensors, torch's .pth (both formats, no code in it is run), .caffemodel or .npz.

    The format is detected from the content. From a training program's checkpoint it reads the
    network's state dictionary, without the prefixes of wrappers such as DataParallel. A
    `.index.json` of the Hugging Face hub stands for all files that it names. The names of programs
    in `programs.PROGRAMS` become torchvision's.

    Raises:
      UserError: it is none of these, is damaged, or asks to run code; or it is a program whose
        networks do not equal any of ours.
    """
    path = storage.local(path)
    if path.name.endswith(INDEX):
        arrays, about, digest, is_caffe = _read_shards(path)
    else:
        arrays, about, digest, is_caffe = _read_file(path)
    arrays = _unwrapped(arrays)
    if about:  # this package's own
        return WeightsFile(arrays, about, digest, is_caffe)
    named = programs.renamed(arrays, str(path))
    return WeightsFile(named.arrays, about, digest, is_caffe, named.function)


def _read_shards(path: Path) -> tuple[Arrays, Any, str, bool]:
    """The arrays of all files that an index of the Hugging Face hub names; see `_read_file`."""
    index = storage.read_json(path) if storage.exists(path) else None
    files = index.get("weight_map") if index else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(
            f"{path} is missing, damaged or no index of weights, which names the file of each "
            "tensor in its weight_map; download it again"
        )
    arrays: Arrays = {}
    digests = [storage.sha256_of_file(path)]
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise UserError(f"{path} names {file!r}, which is not a file beside it")
        found, _, digest, _ = _read_file(path.with_name(file))
        missing = [name for name in files if files[name] == file and name not in found]
        if missing:
            raise UserError(
                f"{path} has {len(missing)} tensors in {file} that are not there (such as "
                f"{missing[0]}); download both again"
            )
        arrays |= {name: array for name, array in found.items() if files.get(name) == file}
        digests.append(digest)
    return arrays, {}, hashlib.sha256("".join(digests).encode()).hexdigest(), False


def _read_file(path: Path) -> tuple[Arrays, Any, str, bool]:
    """Arrays by their names in a file, this package's description, SHA-256, whether it is Caffe."""
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
    try:
        arrays, about, is_caffe = _read(path, head)
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of all types
        raise UserError(
            f"{path} is damaged or truncated ({first_line(error)}); download it again"
        ) from error
    if not arrays:
        raise UserError(f"{path} has no state dictionary of tensors; give a file of weights")
    wrong = [
        name
        for name, array in arrays.items()
        if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float64)).all()
    ]
    if wrong:
        raise UserError(
            f"{path} has values that are not finite in {', '.join(wrong)}; get it again, or use "
            "weights of an earlier step"
        )
    return arrays, about, digest, is_caffe


def write_weights(path: Path, arrays: Arrays, about: dict[str, Any]) -> None:
    """Writes a safetensors file that both torch and this package can read."""
    metadata = {"format": "pt", ABOUT: json.dumps(about)}
    whole = {name: np.array(array, order="C") for name, array in arrays.items()}
    try:
        storage.write_by(path, lambda new: safetensors.numpy.save_file(whole, new, metadata))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error


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


def _read(path: Path, head: bytes) -> tuple[Arrays, Any, bool]:
    """Arrays, this package's description of them, and whether they are a Caffe model's."""
    if head[8:9] == b"{":  # after its length, which can be any bytes
        with safetensors.safe_open(path, "np") as file:
            about = (file.metadata() or {}).get(ABOUT, "{}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, json.loads(about), False
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            is_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
        if is_torch:
            return _state_dict(torch_pickle.read_zip(path)), {}, False
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        layers = caffe.layers_of(arrays)
        return (caffe.to_torchvision(layers) if layers else arrays), {}, bool(layers)
    if head.startswith(b"\x80"):
        return _state_dict(torch_pickle.read_legacy(path)), {}, False
    if path.suffix == ".caffemodel":
        return caffe.to_torchvision(caffe.read_caffemodel(path.read_bytes())), {}, True
    raise UserError(
        f"{path} is not a weights file; expected .safetensors, .pth, .th, .caffemodel or .npz"
    )


def _state_dict(read: torch_pickle.Read) -> Arrays:
    """The tensors of a state dictionary, wherever it is in a checkpoint."""
    tree = read.tree
    for _ in range(3):
        keys = tree.keys() if isinstance(tree, dict) else ()
        inner = next((k for k in (*_NESTED, *_AVERAGES) if k in keys), None)
        if inner is None or not isinstance(tree[inner], dict):
            break
        tree = tree[inner]
    tensors = tree.items() if isinstance(tree, dict) else ()
    return read.arrays({str(k): v for k, v in tensors if isinstance(v, torch_pickle.Tensor)})


def _unwrapped(arrays: Arrays) -> Arrays:
    """Removes the prefixes of wrappers, and their counters."""

    def whole(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in arrays) and all(
            key.startswith(prefix) or array.ndim == 0 for key, array in arrays.items()
        )

    while prefix := next((p for p in _WRAPPERS if whole(p)), None):
        arrays = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return arrays

"""Reads weights files of all formats, as arrays by torch's names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from resnet_flax.errors import UserError, first_line, listed
from resnet_flax.runtime import storage
from resnet_flax.weights import programs
from resnet_flax.weights.contents import Node, choose
from resnet_flax.weights.formats import ABOUT, Arrays, Contents, damage_explained, read_file
from resnet_flax.weights.torch_tensors import DTYPES

# How names of indices of the Hugging Face hub end.
INDEX = ".index.json"


class WeightsFile(NamedTuple):
    """The contents of a weights file.

    Attributes:
      arrays: of the network, by their names in torch.
      about: this package's description of them, not verified; empty if another program wrote the
        file.
      sha256: of the file.
      caffe: whether it is a Caffe model.
      left_out: names of arrays that are not the network's.
      function: attributes of the network that its program decides, whatever the shapes.
    """

    arrays: Arrays
    about: Any
    sha256: str
    caffe: bool = False
    left_out: tuple[str, ...] = ()
    function: Mapping[str, Any] = {}


def read_weights(path: str | Path, address: str = "") -> WeightsFile:
    """Reads safetensors, torch's .pth (both formats, no code in it is run), .caffemodel or .npz.

    The format is detected from the content. From a training program's checkpoint it reads the
    network's state dictionary, without the prefixes of wrappers such as DataParallel and of larger
    networks. A `.index.json` of the Hugging Face hub stands for all files that it names. The names
    of programs in `programs.PROGRAMS` become torchvision's.

    Args:
      path: of the file.
      address: of the network, see `contents.choose`; needed if the file has several.

    Raises:
      UserError: it is none of these, is damaged, asks to run code, has several networks and
        `address` does not say which, or is of a program whose networks do not equal any of ours.
    """
    path = storage.local(path)
    found, digest = _read_shards(path) if path.name.endswith(INDEX) else read_file(path)
    network = choose(found.nodes, address, str(path))
    with damage_explained(path):
        arrays = found.arrays(network.tensors)
    _check_numbers(arrays, path)
    if found.about:  # this package's own
        return WeightsFile(arrays, found.about, digest, found.caffe, network.left_out)
    named = programs.renamed(arrays, str(path))
    return WeightsFile(
        named.arrays, found.about, digest, found.caffe, network.left_out, named.function
    )


def _read_shards(path: Path) -> tuple[Contents, str]:
    """The arrays of all files that an index of the Hugging Face hub names; see `read_file`."""
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
        # What cannot be printed, such as NUL, is in no name either.
        if (
            not file.isprintable()
            or len(file) > 255
            or Path(file).name != file
            or file in ("", "..")
        ):
            raise UserError(f"{path} names {file[:80]!a}, which is not a file beside it")
        found, digest = read_file(path.with_name(file))
        tensors = {n: t for node in found.nodes for n, t in node.tensors.items() if not node.path}
        missing = [name for name in files if files[name] == file and name not in tensors]
        if missing:
            raise UserError(
                f"{path} has {len(missing)} tensors in {file} that are not there (such as "
                f"{missing[0]}); download both again"
            )
        with damage_explained(path.with_name(file)):
            arrays |= found.arrays({n: t for n, t in tensors.items() if files.get(n) == file})
        digests.append(digest)
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Contents([Node("", arrays)], dict), whole


def _check_numbers(arrays: Arrays, path: Path) -> None:
    """Raises UserError if an array has something else than finite real numbers."""
    others = [name for name, array in arrays.items() if not _is_real(array.dtype)]
    if others:
        kinds = {str(arrays[name].dtype) for name in others}
        raise UserError(
            f"{path} has {listed(kinds)} in {listed(others)}, not real numbers; give a file of "
            "weights"
        )
    wrong = [
        name
        for name, array in arrays.items()
        if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float64)).all()
    ]
    if wrong:
        raise UserError(
            f"{path} has values that are not finite in {listed(wrong)}; get it again, or use "
            "weights of an earlier step"
        )


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" or (dtype in DTYPES.values() and dtype.kind != "c")


def write_weights(path: Path, arrays: Arrays, about: dict[str, Any]) -> None:
    """Writes a safetensors file that both torch and this package can read."""
    metadata = {"format": "pt", ABOUT: json.dumps(about)}
    whole = {name: np.array(array, order="C") for name, array in arrays.items()}
    try:
        storage.write_by(path, lambda new: safetensors.numpy.save_file(whole, new, metadata))
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error

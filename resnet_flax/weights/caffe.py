"""The original Caffe models of He et al.: ResNet-50, 101 and 152.

Read from the .caffemodel, without Caffe, or from an .npz with arrays `LAYER/0`, `LAYER/1`, ...
in Caffe's order of blobs. The networks are `resnet50_v1` and deeper with stem_pool='ceil' and, for
50 layers, stem_bias=True; they took images in BGR, which is undone here.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Layers = dict[str, list[np.ndarray]]

# A field of a protocol-buffer message: its number and its value, an int or bytes.
_Field = tuple[int, Any]


def read_caffemodel(data: bytes) -> Layers:
    """Reads the blobs of a serialised caffe.NetParameter, by layer name.

    Raises:
      ValueError: it is not one, or truncated.
    """
    layers: Layers = {}
    for number, layer in _fields(data):
        if number != 100:  # NetParameter.layer
            continue
        fields = list(_fields(layer))
        name = next(value for key, value in fields if key == 1).decode()
        blobs = [_blob(value) for key, value in fields if key == 7]
        if blobs:
            layers[name] = blobs
    return layers


def _blob(data: bytes) -> np.ndarray:
    """A caffe.BlobProto: packed floats, and a shape in one of two forms."""
    fields = list(_fields(data))
    values = np.concatenate([np.frombuffer(v, "<f4") for key, v in fields if key == 5])
    shape = [n for key, v in fields if key == 7 for k, d in _fields(v) if k == 1 for n in _ints(d)]
    if not shape:  # num, channels, height, width; leading 1s are dropped
        shape = [value for key, value in sorted(fields[:4]) if key in (1, 2, 3, 4)]
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
    return values.reshape(shape)


def _ints(value: int | bytes) -> list[int]:
    """A repeated integer, packed or not."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _fields(data: bytes) -> Iterator[_Field]:
    """The fields of a message, by the wire format of protocol buffers."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("not a message of protocol buffers")
        if at + size > len(data):
            raise ValueError("a message is truncated")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a message is truncated")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("not a message of protocol buffers")


def layers_of(arrays: Arrays) -> Layers | None:
    """The layers in the arrays of an .npz, or None if they are not those of a Caffe model."""
    if not all(re.fullmatch(r"[^/]+/\d", key) for key in arrays) or "conv1/0" not in arrays:
        return None
    layers: Layers = {}
    for key in sorted(arrays):
        layers.setdefault(key.partition("/")[0], []).append(arrays[key])
    return layers


def to_torchvision(layers: Layers) -> Arrays:
    """The arrays under torchvision's names, for images in RGB.

    Raises:
      ValueError: a layer is not one of these models'.
    """
    arrays: Arrays = {}
    for layer, blobs in layers.items():
        name, kind = _name(layer)
        if kind == "bn":
            mean, var, factor = blobs
            # Caffe stores sums, and the number to divide them by.
            scale = 1 / factor.item() if factor.item() else 0.0
            arrays[f"{name}.running_mean"] = mean.reshape(-1) * np.float32(scale)
            arrays[f"{name}.running_var"] = var.reshape(-1) * np.float32(scale)
            continue
        arrays[f"{name}.weight"] = blobs[0].reshape(-1) if kind == "scale" else blobs[0]
        if len(blobs) > 1:
            arrays[f"{name}.bias"] = blobs[1].reshape(-1)
    arrays["conv1.weight"] = arrays["conv1.weight"][:, ::-1]
    return arrays


def _name(layer: str) -> tuple[str, str]:
    """Torchvision's name of a Caffe layer, and its kind: 'conv', 'bn', 'scale' or 'fc'."""
    if layer in ("conv1", "bn_conv1", "scale_conv1"):
        kind = layer.partition("_")[0] if "_" in layer else "conv"
        return ("conv1" if kind == "conv" else "bn1"), kind
    if layer.startswith("fc"):
        return "fc", "fc"
    # res2a_branch2b, bn3b7_branch1: stage, block as a letter or as b and a number, branch,
    # position.
    match = re.fullmatch(r"(res|bn|scale)(\d)(?:([a-z])|b(\d+))_branch(?:1|2([abc]))", layer)
    if match is None:
        raise ValueError(f"an unknown layer {layer!r}")
    kind, stage, letter, number, place = match.groups()
    block = ord(letter) - ord("a") if letter else int(number)
    prefix = f"layer{int(stage) - 1}.{block}"
    kind = "conv" if kind == "res" else kind
    if place is None:
        return f"{prefix}.downsample.{0 if kind == 'conv' else 1}", kind
    return f"{prefix}.{'conv' if kind == 'conv' else 'bn'}{'abc'.index(place) + 1}", kind

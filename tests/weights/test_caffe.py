"""The original Caffe models, from files as Caffe writes them."""

import importlib.util
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import drawn

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.ops.max_pool import max_pool
from resnet_flax.weights.caffe import to_torchvision
from resnet_flax.weights.files import read_weights
from resnet_flax.weights.loading import load, load_pretrained
from resnet_flax.weights.torch_layout import export_torch, flatten

AXES = {"stem_bias": True, "stem_pool": "ceil", "stage_sizes": (2, 1, 1, 1), "num_classes": 5}


def _variables(model):
    rng = np.random.default_rng(0)
    variables = drawn(model, jnp.zeros((1, 64, 64, 3)))

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        name = str(path[-1].key)
        if name in ("scale", "var"):
            return 0.5 + np.abs(values)
        return values / np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 0.3 * values

    return jax.tree_util.tree_map_with_path(draw, variables)


def _layers(arrays):
    """The same in Caffe's form: its names, BGR, sums of statistics and their divisors."""
    layers = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        if module == "fc":
            layers.setdefault("fc1000", {})[0 if leaf == "weight" else 1] = array
            continue
        if module in ("conv1", "bn1"):
            end, conv = "conv1", "conv1"
        else:
            parts = module.split(".")
            branch = "1" if "downsample" in parts else "2" + "abc"[int(parts[-1][-1]) - 1]
            end = f"{int(parts[0][-1]) + 1}{'abcdef'[int(parts[1])]}_branch{branch}"
            conv = f"res{end}"
        is_norm = "bn" in module or module.endswith("downsample.1")
        if not is_norm:
            blob = array[:, ::-1] if module == "conv1" and leaf == "weight" else array
            layers.setdefault(conv, {})[0 if leaf == "weight" else 1] = blob
        elif leaf.startswith("running"):
            prefix = "bn_" if end == "conv1" else "bn"
            bn = layers.setdefault(f"{prefix}{end}", {2: np.array([999.98], np.float32)})
            bn[["running_mean", "running_var"].index(leaf)] = array * np.float32(999.98)
        else:
            prefix = "scale_" if end == "conv1" else "scale"
            layers.setdefault(f"{prefix}{end}", {})[0 if leaf == "weight" else 1] = array
    return {name: [blobs[i] for i in sorted(blobs)] for name, blobs in layers.items()}


def _varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _caffemodel(layers, old_shapes=False):
    """caffe.NetParameter, in the wire format of protocol buffers."""
    out = _field(1, b"ResNet-50") + _varint(6 << 3 | 0) + _varint(1)
    out += _field(100, _field(1, b"data") + _field(2, b"Input"))
    for name, blobs in layers.items():
        layer = _field(1, name.encode()) + _field(2, b"Convolution")
        for blob in blobs:
            if old_shapes:
                dims = (1,) * (4 - blob.ndim) + blob.shape
                shape = b"".join(_varint(i << 3) + _varint(d) for i, d in enumerate(dims, 1))
            else:
                shape = _field(7, _field(1, b"".join(map(_varint, blob.shape))))
            layer += _field(7, shape + _field(5, np.ascontiguousarray(blob, "<f4").tobytes()))
        out += _field(100, layer) + _varint(200 << 3 | 5) + struct.pack("<f", 1.0)
    return out


@pytest.mark.usefixtures("soon_traced")
@pytest.mark.parametrize("kind", ["caffemodel", "old shapes", "npz"])
def test_a_caffe_model_gives_its_variables_back(tmp_path, kind):
    model = create_model("resnet50_v1", **AXES)
    variables = _variables(model)
    layers = _layers(export_torch(variables, model, "torchvision"))
    assert {"conv1", "bn_conv1", "res2a_branch1", "scale2b_branch2c", "fc1000"} <= set(layers)
    path = tmp_path / ("x.npz" if kind == "npz" else "x.caffemodel")
    if kind == "npz":
        np.savez(
            path, **{f"{n}/{i}": b for n, blobs in layers.items() for i, b in enumerate(blobs)}
        )
    else:
        path.write_bytes(_caffemodel(layers, kind == "old shapes"))
    loaded = flatten(load_pretrained(path, model))
    expected = flatten(variables)
    assert loaded.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(loaded[key], array, rtol=1e-6, err_msg=str(key))


@pytest.mark.usefixtures("soon_traced")
def test_a_caffe_model_by_its_file_is_used_as_it_was_made(tmp_path):
    model = create_model("resnet50_v1", **AXES)
    layers = _layers(export_torch(_variables(model), model, "torchvision"))
    path = tmp_path / "x.caffemodel"
    path.write_bytes(_caffemodel(layers))
    for wrong in ({"stem_pool": "padded"}, {"stride_on": "3x3"}):
        with pytest.raises(UserError, match=f"is for a network with {next(iter(wrong))}="):
            load_pretrained(path, create_model("resnet50_v1", **{**AXES, **wrong}))
    full = create_model("resnet50_v1", stem_bias=True, stem_pool="ceil", num_classes=5)
    path.write_bytes(_caffemodel(_layers(export_torch(_variables(full), full, "torchvision"))))
    found = load(str(path), variant="resnet50_v1")
    assert (found.model.stem_pool, found.model.stem_bias) == ("ceil", True)
    # RGB; the authors' mean is 103 for blue and 123 for red.
    assert [round(255 * m) for m in found.preprocessing.mean] == [123, 116, 103]
    assert found.preprocessing.std == (1 / 255,)
    with pytest.raises(UserError, match="is for a network with stride_on='1x1', not '3x3'"):
        load(str(path), variant="resnet50")


def test_blocks_of_the_deep_ones_are_numbered():
    one = [np.zeros((2, 2, 1, 1), np.float32)]
    arrays = to_torchvision({"conv1": one, "res4b22_branch2c": one, "res4a_branch1": one})
    assert set(arrays) == {"conv1.weight", "layer3.22.conv3.weight", "layer3.0.downsample.0.weight"}


@pytest.mark.parametrize("n", range(4, 16))
def test_pooling_in_ceil_mode(n):
    """Windows from the edge, and one more if positions would remain."""
    x = np.random.default_rng(n).normal(size=(1, n, n + 1, 2)).astype(np.float32)
    pooled = np.asarray(max_pool(jnp.asarray(x), ceil=True))
    for axis, side in ((1, n), (2, n + 1)):
        assert pooled.shape[axis] == -(-(side - 3) // 2) + 1
    for i in range(pooled.shape[1]):
        for j in range(pooled.shape[2]):
            window = x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            np.testing.assert_array_equal(pooled[0, i, j], window.max((0, 1)))


def test_damaged_and_strange_caffe_models_are_explained(tmp_path):
    path = tmp_path / "x.caffemodel"
    whole = _caffemodel({"conv1": [np.ones((2, 3, 1, 1), np.float32)], "fc": [np.ones((2, 2))]})
    for end in range(30, len(whole) - 1):
        path.write_bytes(whole[:end])
        try:
            read_weights(path)
        except UserError as error:
            assert "x.caffemodel is damaged or truncated" in str(error)  # noqa: PT017
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"x.caffemodel is damaged or truncated"):
        read_weights(path)
    path.write_bytes(_caffemodel({"conv1": [np.ones((2, 3, 1, 1))], "relu9": [np.ones(2)]}))
    with pytest.raises(UserError, match=r"damaged or truncated .an unknown layer 'relu9'"):
        read_weights(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision", "timm"))),
    reason="needs torch, torchvision and timm",
)
@pytest.mark.usefixtures("x64")
def test_the_network_is_the_one_that_torch_makes_of_it():
    """Bias in the stem, pooling in ceil mode, the stride on the first 1x1."""
    import torch_networks
    from torch import nn

    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = create_model("resnet50_v1", **AXES, **types)
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), _variables(model))
    torch, tv = torch_networks.torch, torch_networks.tv
    theirs = torch_networks._paper_strides(tv.ResNet(tv.Bottleneck, [2, 1, 1, 1], 5)).double()
    theirs.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=True).double()
    theirs.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True)
    torch_networks.load(theirs, export_torch(variables, model, "torchvision"))
    images = np.random.default_rng(2).normal(size=(2, 70, 93, 3))
    with torch.no_grad():
        expected = theirs.eval()(torch_networks.channels_first(images)).numpy()
    logits = model.apply(variables, jnp.asarray(images), train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-10 * np.abs(expected).max())

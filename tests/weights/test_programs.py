"""Residual networks under the names of other programs: recognized, equal, or refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from other_programs import assert_same, drawn, shapes

from resnet_flax import UserError, create_model, load
from resnet_flax.weights.identify import infer
from resnet_flax.weights.loading import load_pretrained
from resnet_flax.weights.programs import renamed

pytestmark = pytest.mark.usefixtures("soon_traced")

SMALL = {"stage_sizes": (1, 2), "stage_features": (8, 16), "stem_features": 8, "num_classes": 3}


def _saved(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("kuangliu", "resnet18_cifar"),
        ("chenyaofo", "cifar_resnet20_b"),
        ("weiaicunzai", "resnet50_cifar"),
    ],
)
def test_a_program_s_network_is_the_same_in_float64(tmp_path, program, name):
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = create_model(name, **SMALL, **types)
    bottleneck = model.block == "bottleneck"
    widths = (32, 64) if bottleneck else (8, 16)
    network = {"depths": (1, 2), "widths": widths, "bottleneck": bottleneck}
    arrays = drawn(program, **network)
    path = _saved(tmp_path / "w.npz", arrays)
    variables = load_pretrained(path, model)
    assert_same(variables, model, arrays, program, 9, **network)
    if bottleneck:
        with pytest.raises(UserError, match="is for a network with stride_on='3x3', not '1x1'"):
            load_pretrained(path, model.clone(stride_on="1x1"))


@pytest.mark.parametrize(
    ("program", "network", "name"),
    [
        # akamaster's with option B has the names of kuangliu's.
        ("kuangliu", {"depths": (3, 3, 3), "widths": (16, 32, 64)}, "cifar_resnet20_b"),
        ("chenyaofo", {"depths": (5, 5, 5), "widths": (16, 32, 64)}, "cifar_resnet32_b"),
        ("weiaicunzai", {"depths": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}, "resnet18_cifar"),
        ("transformers", {"depths": (2, 2, 2, 2), "widths": (64, 128, 256, 512)}, "resnet18"),
    ],
)
def test_the_network_is_recognized(program, network, name):
    arrays = {n: np.broadcast_to(np.float32(0), s) for n, s in _shapes(program, network).items()}
    found = renamed(arrays, "w.pth")
    assert infer(found.arrays, "w.pth", found.function) == create_model(name, num_classes=100)


def _shapes(program, network):
    return shapes(program, classes=100, **network)


def test_a_file_of_another_program_is_loaded(tmp_path):
    arrays = drawn("kuangliu", depths=(3, 3, 3), widths=(16, 32, 64), classes=10)
    # As with DataParallel.
    path = _saved(tmp_path / "w.npz", {f"module.{name}": array for name, array in arrays.items()})
    found = load(path)
    assert found.model == create_model("cifar_resnet20_b")
    assert found.preprocessing is None  # for the user to say
    head = found.variables["params"]["head"]["bias"]
    np.testing.assert_array_equal(head, np.float32(arrays["linear.bias"]))


def test_transformers_names_leave_two_networks():
    network = {"depths": (3, 4, 6, 3), "widths": (256, 512, 1024, 2048), "bottleneck": True}
    shapes = _shapes("transformers", network)
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found = renamed(arrays, "w.pth")
    with pytest.raises(
        UserError, match="fits resnet50 and resnet50_v1, which have the same shapes"
    ):
        infer(found.arrays, "w.pth", found.function)


BASIC = {"depths": (1, 1, 1), "widths": (16, 32, 64)}


def _pre_activation(arrays):
    for name in [name for name in arrays if "shortcut.1" in name]:
        del arrays[name]


def _one_by_one(arrays):
    arrays["conv1.weight"] = arrays["conv1.weight"][..., :1, :1]


def _excited(arrays):
    arrays["layer1.0.fc1.weight"] = np.zeros((1, 16, 1, 1))


def _option_a(arrays):
    for name in [name for name in arrays if "shortcut" in name]:
        del arrays[name]
    for leaf in ("weight", "bias"):
        arrays[f"fc.{leaf}"] = arrays.pop(f"linear.{leaf}")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.weight", ()),
        ("conv1.weight", (16,)),
        ("layer2.0.conv1.weight", (32,)),
        ("conv2_x.0.residual_function.2.weight", (16,)),
    ],
)
def test_other_shapes_and_places_are_those_of_no_network(name, shape):
    program = "weiaicunzai" if name.startswith("conv2_x") else "kuangliu"
    arrays = {**drawn(program, **BASIC), name: np.zeros(shape)}
    if name.startswith("layer2"):
        _option_a(arrays)
    found = renamed(arrays, "w.pth")
    with pytest.raises(UserError, match="are not those of a known network"):
        infer(found.arrays, "w.pth", found.function)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pre_activation, "has the names of pre-activation blocks as in kuangliu/pytorch-cifar, w"),
        (_one_by_one, "the ResNeXt of kuangliu/pytorch-cifar, whose stem is a 1x1 convolution; no"),
        (_excited, "the squeeze-and-excitation blocks of kuangliu/pytorch-cifar; no network here"),
        (_option_a, "without parameters and a head called fc, .* call the head linear$"),
        (
            lambda a: a.update({"conv2_x.0.residual.0.weight": np.zeros(1)}),
            "pre-activation, squeeze-and-excitation and stochastic depth networks of weiaicunzai/p",
        ),
    ],
)
def test_what_no_network_here_equals_is_refused(tmp_path, change, message):
    arrays = drawn("kuangliu", **BASIC)
    change(arrays)
    path = _saved(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError, match=message):
        load(path)

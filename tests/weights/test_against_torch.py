"""The networks compute the same as those of the published weights.

Golden logits everywhere; where torch, torchvision and timm are installed, live comparisons in
float64 of evaluation, loss, gradients and running statistics.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from resnet_flax import VARIANTS, UserError, create_model
from resnet_flax.models.scan import stack
from resnet_flax.weights.fitting import fit_arrays, torch_shapes
from resnet_flax.weights.torch_layout import export_torch, flatten, from_torch, torch_name

GOLDENS = json.loads((Path(networks.__file__).parent / "outputs.json").read_text())
LABELS = np.array([0, 3, 6, 2])


@pytest.mark.parametrize("name", networks.CASES)
def test_float32_maps_and_logits_are_the_golden_ones(name):
    model = networks.network(name, jnp.float32)
    variables = jax.tree.map(jnp.float32, networks.random_variables(name))
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False, return_features=True))(
        variables, jnp.float32(networks.images(name))
    )
    goldens = GOLDENS[name]
    assert set(outputs) == {"pooled", *goldens}
    for key, golden in goldens.items():
        sample = outputs[key] if key == "logits" else networks.sample(outputs[key])
        assert np.abs(sample - np.array(golden)).max() <= 1e-4 * np.abs(golden).max(), key


def test_every_golden_tells_images_and_classes_apart():
    for goldens in GOLDENS.values():
        for golden in map(np.array, goldens.values()):
            assert golden.shape == (4, networks.CLASSES)
            # Outputs vary by ten times the tolerance, in every class.
            assert np.std(golden, axis=0).min() > 1e-3 * np.abs(golden).max()
            assert np.std(golden, axis=1).min() > 1e-3 * np.abs(golden).max()


def live(test):
    """Marks a comparison that needs torch; its warnings are ignored."""
    there = all(map(importlib.util.find_spec, ("torch", "torchvision", "timm")))
    test = pytest.mark.filterwarnings("ignore")(test)
    return pytest.mark.skipif(not there, reason="needs torch, torchvision and timm")(test)


@live
@pytest.mark.parametrize("name", networks.CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_every_layer_is_torch_s(name, dtype, tolerance):
    import torch_networks

    layout = networks.CASES[name][1].removesuffix("_v1")
    variables, images = networks.random_variables(name), networks.images(name).astype(dtype)
    theirs = torch_networks.torch_network(name).eval()
    model = networks.network(name, jnp.dtype(dtype))
    torch_networks.load(theirs, export_torch(variables, model, layout))
    expected = torch_networks.outputs(theirs.to(getattr(torch_networks.torch, dtype)), images)
    with jax.enable_x64(dtype == "float64"):
        _, state = model.apply(
            jax.tree.map(lambda a: jnp.asarray(a, dtype), variables),
            jnp.asarray(images),
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
    ours = {path.removesuffix("/__call__"): a for (_, path), a in flatten(state).items()}
    # A layer's output is compared under the name of its weights, a block's under its own.
    weights = {path.rpartition("/")[0]: path for _, path in flatten(variables)}
    compared = 0
    for path, actual in ours.items():
        if path in weights:
            there = torch_name(weights[path], model, layout).rpartition(".")[0]
        elif "/" not in path and path.startswith("stage"):
            there = torch_networks.block_name(path, layout)
        else:
            continue
        if layout == "timm_v2" and "norm" in path:
            actual = np.maximum(actual, 0)  # in timm, normalisation and activation are one module
        wanted = expected[there].reshape(actual.shape)
        assert np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max(), path
        compared += 1
    assert compared == len(weights) + sum(model.stage_sizes)


@live
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", networks.CASES)
def test_training_is_torch_s_in_float64(name):
    import torch_networks
    from torch_networks import torch

    layout = networks.CASES[name][1].removesuffix("_v1")
    model, theirs = networks.network(name, jnp.float64), torch_networks.torch_network(name)
    variables, images = networks.random_variables(name), jnp.asarray(networks.images(name))
    torch_networks.load(theirs, export_torch(variables, model, layout))
    x = torch_networks.channels_first(networks.images(name))
    variables = jax.tree.map(jnp.asarray, variables)

    expected = theirs.eval()(x).detach().numpy()
    actual = model.apply(variables, images, train=False)
    assert np.abs(actual - expected).max() <= 1e-10 * np.abs(expected).max()

    expected_loss = torch.nn.functional.cross_entropy(theirs.train()(x), torch.tensor(LABELS))
    expected_loss.backward()

    def loss_of(params):
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(4), LABELS].mean(), updated

    (loss, updated), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        variables["params"]
    )
    assert abs(loss - expected_loss.item()) <= 1e-10 * expected_loss.item()
    expected_gradients = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    _near(export_torch({"params": gradients}, model, layout), expected_gradients)
    statistics = {k: v.numpy() for k, v in theirs.state_dict().items() if "running" in k}
    _near(export_torch(updated, model, layout), statistics)


@live
@pytest.mark.usefixtures("x64")
def test_every_network_with_a_name_of_timm_is_timm_s_in_float64():
    from torch_networks import channels_first, timm, torch

    names = {*VARIANTS} & {*timm.list_models()} - {"seresnet18", "seresnet34"}  # se_divisor=1
    assert len(names) >= 47
    x = networks.images("resnet50")[:1, :33, :47]
    for name in sorted(names):
        with torch.device("meta"):
            whole = timm.create_model(name).state_dict()
        theirs = {k: tuple(a.shape) for k, a in whole.items() if "num_batches" not in k}
        ours = torch_shapes(create_model(name), {}).items()
        assert {k: shape for k, (_, shape) in ours} == theirs, name

        # Fewer blocks, and all of their widths.
        small = timm.create_model(name, layers=(2, 1, 1, 1), num_classes=7).double().eval()
        rng = np.random.default_rng(0)
        arrays = {k: _drawn(rng, k, a.shape) for k, a in small.state_dict().items()}
        small.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
        expected = small(channels_first(x)).detach().numpy()
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        model = create_model(name, num_classes=7, stage_sizes=(2, 1, 1, 1), **types)
        variables = fit_arrays(arrays, model, name)
        actual = jax.jit(lambda v, model=model: model.apply(v, x, train=False))(variables)
        assert np.abs(actual - expected).max() <= 1e-10 * np.abs(expected).max(), name


def _drawn(rng, name, shape):
    """An array of a state dictionary: kernels keep the scale, the others are not trivial."""
    values = np.asarray(rng.normal(size=shape))
    if len(shape) > 1:
        return values / np.sqrt(np.prod(shape[1:]))
    return np.asarray(0.5 + np.abs(values) if name.endswith(("var", "weight")) else 0.3 * values)


def _near(ours, theirs):
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert np.linalg.norm(ours[name] - expected) <= 1e-8 * np.linalg.norm(expected), name


@pytest.mark.parametrize("name", networks.CASES)
def test_there_and_back(name):
    layout = networks.CASES[name][1].removesuffix("_v1")
    model, variables = networks.network(name, jnp.float32), networks.random_variables(name)
    exported = export_torch(variables, model, layout)
    flat = flatten(variables)
    assert len(exported) == len(flat)
    for (_, path), array in flat.items():
        back = from_torch(path, exported[torch_name(path, model, layout)])
        np.testing.assert_array_equal(back, array)


def test_a_scanned_network_is_exported_as_an_unrolled_one():
    model = networks.network("cifar_resnet20", jnp.float32)
    variables = jax.tree.map(jnp.float32, networks.random_variables("cifar_resnet20"))
    expected = export_torch(variables, model, "akamaster")
    actual = export_torch(stack(variables), model.clone(scan=True), "akamaster")
    assert list(actual) != []
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_projections_have_no_place_in_the_cifar_layout():
    model = networks.network("cifar_resnet20", jnp.float32)
    with pytest.raises(UserError, match="akamaster has no projections"):
        torch_name("stage2_block1/shortcut/conv/kernel", model, "akamaster")

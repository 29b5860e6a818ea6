from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import drawn

from resnet_flax import UserError, create_model


def _shapes(model, size=32, channels=3):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("option", "extra"), [("A", 0), ("B", 2), ("C", 9)])
def test_shortcut_parameters(option, extra):
    params = _shapes(create_model("cifar_resnet20", shortcut=option))["params"]
    projected = [name for name, block in params.items() if "shortcut" in block]
    assert len(projected) == extra
    in_out = {"A": [], "B": [(16, 32), (32, 64)], "C": [(16, 16)] * 3 + [(16, 32)]}[option]
    if option == "C":
        in_out += [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    assert _count(params) == 269_722 + sum(i * o + 2 * o for i, o in in_out)


def test_names_and_shapes_are_public():
    params = _shapes(create_model("cifar_resnet20", num_classes=7))["params"]
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert paths["stem/conv1/kernel"] == (3, 3, 3, 16)
    assert paths["stem/norm1/scale"] == (16,)
    assert paths["stage1_block1/conv1/kernel"] == (3, 3, 16, 16)
    assert paths["stage2_block1/conv1/kernel"] == (3, 3, 16, 32)
    assert paths["stage3_block3/norm2/bias"] == (64,)
    assert paths["head/kernel"] == (64, 7)
    assert len(paths) == 19 * 3 + 2


def _maps(model, variables, x):
    return jax.jit(partial(model.apply, train=False, return_features=True))(variables, x)


def test_feature_maps():
    model = create_model("cifar_resnet20", stage_sizes=(1, 2, 1))
    x = jnp.ones((2, 32, 32, 3))
    variables = drawn(model, x)
    maps = _maps(model, variables, x)
    shapes = {name: value.shape for name, value in maps.items()}
    assert shapes == {
        "c2": (2, 32, 32, 16),
        "c3": (2, 16, 16, 32),
        "c4": (2, 8, 8, 64),
        "pooled": (2, 64),
        "logits": (2, 10),
    }
    logits = jax.jit(partial(model.apply, train=False))(variables, x)
    np.testing.assert_array_equal(maps["logits"], logits)


@pytest.mark.usefixtures("x64", "soon_traced")
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("cifar_resnet8", {"stage_sizes": (1, 1)}),
        ("cifar_resnetv2_164", {"stage_sizes": (1, 2), "scan": True}),  # a norm before the pooling
    ],
)
def test_without_a_head_a_network_returns_the_head_s_input(name, axes):
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    widths = {"stage_features": (4, 8), "stem_features": 4}
    whole = create_model(name, num_classes=3, **types, **widths, **axes)
    headless = create_model(name, num_classes=0, **types, **widths, **axes)
    x = jax.random.normal(jax.random.key(1), (2, 12, 12, 3), jnp.float64)
    variables = drawn(whole, x)
    head = variables["params"].pop("head")
    shapes = jax.eval_shape(lambda: headless.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)

    def logits_of(params, train, pool_window=0):
        given = {**variables, "params": params}
        settings = {"train": train, "pool_window": pool_window, "mutable": ["batch_stats"]}
        features, updated = headless.apply(given, x, **settings)
        return features @ head["kernel"] + head["bias"], updated

    def whole_logits(params, train, pool_window=0):
        given = {**variables, "params": {**params, "head": head}}
        settings = {"train": train, "pool_window": pool_window, "mutable": ["batch_stats"]}
        return whole.apply(given, x, **settings)

    @jax.jit
    def everything(params):
        results = []
        for function in (logits_of, whole_logits):
            _, pullback, updated = jax.vjp(partial(function, train=True), params, has_aux=True)
            logits, _ = function(params, False)
            positions, _ = function(params, False, pool_window=3)
            weights = jnp.arange(6.0).reshape(2, 3)
            results.append((logits, positions, pullback(weights), updated))
        return results

    ours, theirs = everything(variables["params"])
    assert ours[0].shape == (2, 3)
    assert ours[1].shape == (2, 4, 4, 3)
    assert np.abs(ours[0]).min() > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), ours, theirs)
    maps = _maps(headless, variables, x)
    assert list(maps) == ["c2", "c3", "pooled"]


def test_option_a_takes_every_other_pixel_and_pads_channels():
    # If the residual branch is zero, a block is its shortcut.
    model = create_model("cifar_resnet20", stage_sizes=(1, 2, 1))
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
    variables = drawn(model, x)
    for name, block in variables["params"].items():
        if name.startswith("stage"):
            block["norm2"]["scale"] *= 0
    maps = _maps(model, variables, x)
    c2, c3 = maps["c2"], maps["c3"]
    np.testing.assert_array_equal(c3[..., 8:24], c2[:, ::2, ::2])
    assert not c3[..., :8].any()
    assert not c3[..., 24:].any()


def test_plain_has_no_shortcut():
    model = create_model("cifar_plain20", stage_sizes=(1, 2, 1))
    x = jnp.ones((1, 8, 8, 3))
    variables = drawn(model, x)
    for name, block in variables["params"].items():
        if name.startswith("stage"):
            block["norm2"]["scale"] *= 0
    assert not _maps(model, variables, x)["c4"].any()


def test_logits_are_float32_under_bfloat16():
    model = create_model("cifar_resnet20", stage_sizes=(1, 2, 1), dtype=jnp.bfloat16)
    x = jnp.ones((1, 8, 8, 3))
    variables = drawn(model, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    maps = _maps(model, variables, x)
    assert maps["c3"].dtype == jnp.bfloat16
    assert maps["logits"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "axes", "message"),
    [
        ("cifar_resnet21", {}, "no model called 'cifar_resnet21'; did you mean cifar_resnet"),
        (
            "cifar_resnet20",
            {"shortcuts": "A"},
            "no attribute called .shortcuts.; did you mean short",
        ),
        ("cifar_resnet20", {"shortcut": "D"}, "shortcut must be one of A, B, C, none, not 'D'"),
    ],
)
def test_bad_names_are_explained(name, axes, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **axes)

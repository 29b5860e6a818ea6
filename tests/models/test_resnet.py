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

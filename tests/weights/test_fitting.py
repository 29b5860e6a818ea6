"""Loading variables of one network into another with the same parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from resnet_flax import UserError, create_model
from resnet_flax.models.scan import stack, unstack
from resnet_flax.weights.fitting import fit_variables

pytestmark = pytest.mark.usefixtures("soon_traced")

SMALL = {"stage_features": (8, 16), "stem_features": 8}


def _random(model, channels=3):
    images = jnp.zeros((1, 32, 32, channels))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def _same(ours, theirs):
    a, b = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("cifar_resnet20", {"stage_sizes": (3, 2)}),
        ("cifar_resnet20", {"stage_sizes": (3, 1), "norm": "group", "shortcut": "C"}),
        ("cifar_resnetv2_164", {"stage_sizes": (2, 3), "se_ratio": 4}),
        ("cifar_plain20", {"stage_sizes": (2, 2)}),
        ("resnet50d", {"stage_sizes": (1, 3)}),
        # Pre-activation with option A, which no torch library has.
        ("cifar_resnet20", {"stage_sizes": (2, 2), "preactivation": True, "se_ratio": 2}),
    ],
)
def test_scanned_or_not_they_are_the_same_to_the_bit(name, axes):
    plain = create_model(name, num_classes=4, **SMALL, **axes)
    scanned = plain.clone(scan=True, remat=2, dtype=jnp.bfloat16)
    variables = _random(plain)
    stacked = fit_variables(variables, scanned, "x")
    assert stacked["params"].keys() == _random(scanned)["params"].keys()
    _same(stacked, stack(variables))
    for given in (variables, stacked):
        fitted = fit_variables(given, plain, "x")
        _same(fitted, variables)
        assert fitted.keys() == {"params", "batch_stats"}
        _same(fit_variables(given, scanned, "x"), stacked)
        _same(unstack(stacked), variables)


def test_images_of_other_channels():
    model = create_model("cifar_resnet8")
    variables = _random(model, channels=1)
    _same(fit_variables(variables, model, "x"), variables)


def test_variables_become_of_the_network_s_type():
    model = create_model("cifar_resnet8", **SMALL, stage_sizes=(1, 1), param_dtype=jnp.bfloat16)
    variables = _random(model.clone(param_dtype=jnp.float32))
    fitted = fit_variables(variables, model, "x")
    assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {jnp.dtype("bfloat16")}


def test_what_does_not_fit_is_named_all_at_once_by_our_names():
    model = create_model("cifar_resnet8", stage_sizes=(2, 1), **SMALL)
    variables = _random(model)
    params = variables["params"]
    params["stage1_block1"]["conv1"]["kernel"] = jnp.zeros((5, 5, 8, 8))
    params["extra"] = {"kernel": jnp.zeros(1)}
    del params["stem"]["conv1"], variables["batch_stats"]["stage1_block2"]["norm2"]["var"]
    message = (
        "my run does not fit the network: 2 missing (batch_stats/stage1_block2/norm2/var, "
        "params/stem/conv1/kernel); 1 unexpected (params/extra/kernel); 1 of another shape "
        "(params/stage1_block1/conv1/kernel [5, 5, 8, 8], not [3, 3, 8, 8])"
    )
    for wanted in (model, model.clone(scan=True)):
        with pytest.raises(UserError, match=f"^{re.escape(message)}; give the network"):
            fit_variables(variables, wanted, "my run")


def test_another_number_of_classes_needs_a_new_head():
    model = create_model("cifar_resnet20", stage_sizes=(2, 1), num_classes=7, **SMALL)
    variables = _random(model)
    other = model.clone(num_classes=3, scan=True)
    with pytest.raises(UserError, match="x is for 7 classes, the network has 3; ask for a new"):
        fit_variables(variables, other, "x")
    fitted = fit_variables(variables, other, "x", reset_head=True, seed=1)
    fresh = jax.jit(other.init, static_argnames="train")(
        jax.random.key(1), jnp.zeros((1, 8, 8, 3)), train=False
    )
    _same(fitted["params"].pop("head"), fresh["params"]["head"])
    head = variables["params"].pop("head")
    _same(fitted, stack(variables))
    # With the same number of classes the head is kept, even with reset_head.
    variables["params"]["head"] = head
    _same(fit_variables(variables, model, "x", reset_head=True), variables)
    # A damaged head is not taken for another number of classes.
    variables["params"]["head"]["kernel"] = jnp.zeros((99, 7))
    with pytest.raises(UserError, match=r"1 of another shape \(params/head/kernel \[99, 7\]"):
        fit_variables(variables, model, "x", reset_head=True)

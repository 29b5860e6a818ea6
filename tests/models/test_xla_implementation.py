"""implementation='xla': plain operations of JAX, in a network of the same parameters."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.extend.core import jaxprs_in_params
from kinds import KINDS, SIDE, drawn_for, network

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.weights import description

# Rules of our own, a choice by platform, and what constrains the compiler.
OUR_OWN = {"custom_jvp_call", "custom_vjp_call", "linear_with_transpose"}
CHOICE = {"platform_index", "cond"}
BARRIER = {"optimization_barrier"}


def primitives(jaxpr):
    """The names of all operations, also within others."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jaxprs_in_params(equation.params):
            found |= primitives(inner)
    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_traces_have_operations_of_jax_only(kind):
    model = network(kind, "xla")
    variables, x, direction = drawn_for(model)

    def value(params, x, model=model, train=True):
        given = {**variables, "params": params}
        return model.apply(given, x, train=train, mutable=["batch_stats"])[0].sum()

    def second(*at):
        return jax.jvp(jax.grad(value, (0, 1)), at, direction)

    def evaluated(*at):
        return value(*at, train=False)

    def default(*at):
        return value(*at, model=network(kind))

    at = variables["params"], x
    for function in (value, second, evaluated):
        assert not primitives(jax.make_jaxpr(function)(*at).jaxpr) & (OUR_OWN | CHOICE | BARRIER)
    assert primitives(jax.make_jaxpr(default)(*at).jaxpr) >= {"custom_jvp_call", "platform_index"}


@pytest.mark.parametrize("train", [False, True])
def test_a_symbolic_dimension_leaves_no_choice_to_the_platform(train):
    model = create_model("resnet18", stage_sizes=(1, 1), stage_features=(64, 64))
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    apply = jax.jit(lambda given, x: model.apply(given, x, train=train, mutable=["batch_stats"]))
    assert "platform_index" in primitives(apply.trace(variables, images).jaxpr.jaxpr)
    for shape in (f"b, {SIDE}, {SIDE}, 3", "2, 8*h, 8*w, 3"):
        symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
        assert not primitives(apply.trace(variables, symbolic).jaxpr.jaxpr) & CHOICE


def test_weights_fit_both_and_do_not_name_it():
    names = {"num_classes": 3, "stage_sizes": (1,), "stage_features": (4,)}
    models = [create_model("resnet18", implementation=name, **names) for name in ("auto", "xla")]
    x = jnp.zeros((1, SIDE, SIDE, 3))
    shapes = [
        jax.eval_shape(lambda x, model=model: model.init(jax.random.key(0), x, train=False), x)
        for model in models
    ]
    assert jax.tree.map(lambda a, b: a == b, *shapes)
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    described = [description.to_json(model, None, (), "here") for model in models]
    assert described[0] == described[1]
    assert "implementation" not in described[0]["axes"]


def test_another_implementation_is_refused():
    with pytest.raises(UserError, match="implementation must be one of auto, xla, not 'lax'"):
        create_model("resnet18", implementation="lax")
    with pytest.raises(UserError, match="implementation must be one of auto, xla, not None"):
        create_model("resnet18", implementation=None)

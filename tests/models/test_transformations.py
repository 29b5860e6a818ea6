"""Every transformation of JAX and Flax, over one network of each kind."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm
from flax import nnx
from flax.nnx import bridge
from flax.traverse_util import flatten_dict
from jax import export
from kinds import KINDS, SIDE, drawn_for, network
from marks import long

pytestmark = pytest.mark.usefixtures("x64")
BOTH = ("auto", "xla")


def kinds(*quick):
    """All kinds; only the quick ones run in `make test`."""
    return [kind if kind in quick else long(kind) for kind in KINDS]


def kinds_by_both(*quick):
    """All kinds with both implementations."""
    cases = [(kind, implementation) for kind in KINDS for implementation in BOTH]
    return [case if case[0] in quick else long(*case) for case in cases]


def loss_of(model, variables, train=True):
    """A function of parameters and images, with logits and new statistics beside its value."""

    def loss(params, x):
        given = {**variables, "params": params}
        logits, updated = model.apply(given, x, train=train, mutable=["batch_stats"])
        return jnp.sin(logits).sum(), (logits, updated)

    return loss


def value_of(model, variables, train=True):
    """The same without what is beside it."""
    return lambda params, x: loss_of(model, variables, train)(params, x)[0]


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def forward_over_reverse(function, at, direction):
    return jax.jvp(jax.grad(function, (0, 1)), at, direction)[1]


def reverse_over_reverse(function, at, direction):
    slope = jax.grad(function, (0, 1))
    return jax.grad(lambda *at: dot(slope(*at), direction), (0, 1))(*at)


def reverse_over_forward(function, at, direction):
    return jax.grad(lambda *at: jax.jvp(function, at, direction)[1], (0, 1))(*at)


@pytest.mark.parametrize("kind", kinds("bottleneck", "squeeze_excitation", "scanned"))
def test_derivatives_of_the_default_are_those_of_xla(kind):
    models = {implementation: network(kind, implementation) for implementation in BOTH}
    variables, x, direction = drawn_for(models["auto"])

    def derivatives(model, product):
        loss = loss_of(model, variables)
        at = (variables["params"], x)
        value, gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)(*at)
        value_alone = lambda *at: loss(*at)[0]  # noqa: E731
        slope = jax.jvp(value_alone, at, direction)[1]
        return value, gradient, slope, product(value_alone, at, direction)

    found = jax.jit(partial(derivatives, models["auto"], forward_over_reverse))()
    expected = jax.jit(partial(derivatives, models["xla"], reverse_over_reverse))()
    for ours, plain in zip(found, expected, strict=True):
        assert_close_in_norm(ours, plain, 1e-10)
    for _, gradient, slope, _ in (found, expected):
        np.testing.assert_allclose(slope, dot(gradient, direction), rtol=1e-10)


@pytest.mark.parametrize(("kind", "implementation"), kinds_by_both("preact_bottleneck"))
def test_the_order_of_modes_does_not_matter(kind, implementation):
    model = network(kind, implementation)
    variables, x, direction = drawn_for(model)
    value, at = value_of(model, variables), (variables["params"], x)

    @jax.jit
    def products():
        return [
            product(value, at, direction)
            for product in (forward_over_reverse, reverse_over_forward, reverse_over_reverse)
        ]

    @jax.jit
    def slopes():
        along = lambda *at: jax.jvp(value, at, direction)[1]  # noqa: E731
        linear = jax.linearize(value, *at)[1]
        return along(*at), linear(*direction), jax.jvp(along, at, direction)[1]

    first, *others = products()
    for other in others:
        assert_close_in_norm(other, first, 1e-10)
    slope, linearized, curvature = slopes()
    np.testing.assert_allclose(linearized, slope, rtol=1e-12)
    np.testing.assert_allclose(curvature, dot(first, direction), rtol=1e-10)


@pytest.mark.parametrize("implementation", BOTH)
def test_the_slope_is_that_of_finite_differences(implementation):
    model = network("basic", implementation)
    variables, x, direction = drawn_for(model)
    value, at = jax.jit(value_of(model, variables)), (variables["params"], x)
    slope = jax.jit(lambda: jax.jvp(value, at, direction)[1])()

    def moved(step):
        return value(*jax.tree.map(lambda leaf, along: leaf + step * along, at, direction))

    assert slope == pytest.approx(float((moved(1e-6) - moved(-1e-6)) / 2e-6), rel=1e-6)


@pytest.mark.parametrize("implementation", BOTH)
def test_the_hessian_of_a_small_network(implementation):
    sizes = {"stage_sizes": (1,), "stage_features": (2,), "stem_features": 2}
    model = network("plain", implementation, **sizes)
    variables, x, (direction, _) = drawn_for(model)
    params, tree = jax.flatten_util.ravel_pytree(variables["params"])

    def value(params):
        return value_of(model, variables)(tree(params), x)

    hessian = jax.jit(jax.hessian(value))(params)
    along = jax.flatten_util.ravel_pytree(direction)[0]
    product = jax.jit(jax.grad(lambda params: jax.grad(value)(params) @ along))(params)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-10 * np.abs(hessian).max())
    assert_close_in_norm(hessian @ along, product, 1e-10)


@pytest.mark.parametrize(("kind", "implementation"), kinds_by_both("resnext"))
def test_examples_and_networks_can_be_mapped(kind, implementation):
    model = network(kind, implementation)
    variables, x, (direction, _) = drawn_for(model)
    params = variables["params"]
    # In evaluation, as in training an example's gradient depends on the others.
    evaluated, trained = (value_of(model, variables, train) for train in (False, True))

    @jax.jit
    def one_by_one():
        each = jax.vmap(jax.value_and_grad(lambda params, x: evaluated(params, x[None])), (None, 0))
        return jax.tree.map(lambda leaf: leaf.sum(0), each(params, x))

    members = [params, jax.tree.map(jnp.add, params, direction)]

    @jax.jit
    def of_members():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        return jax.vmap(jax.value_and_grad(trained), (0, None))(stacked, x)

    assert_close_in_norm(one_by_one(), jax.jit(jax.value_and_grad(evaluated))(params, x), 1e-10)
    alone = jax.jit(jax.value_and_grad(trained))
    for i, found in enumerate(of_members()[0]):
        assert found == pytest.approx(float(alone(members[i], x)[0]), rel=1e-10)
    for i, member in enumerate(members):
        mapped = jax.tree.map(lambda leaf, i=i: leaf[i], of_members()[1])
        assert_close_in_norm(mapped, alone(member, x)[1], 1e-10)


@pytest.mark.parametrize(("kind", "implementation"), kinds_by_both("basic"))
def test_steps_can_be_scanned_and_rematerialized(kind, implementation):
    model = network(kind, implementation)
    variables, x, _ = drawn_for(model)

    def step(variables, x, wrapped=lambda loss: loss):
        loss = wrapped(loss_of(model, variables))
        (value, (_, updated)), slope = jax.value_and_grad(loss, has_aux=True)(
            variables["params"], x
        )
        params = jax.tree.map(lambda leaf, by: leaf - 0.1 * by, variables["params"], slope)
        return {**updated, "params": params}, value

    batches = jnp.stack([x, 2 * x])
    scanned, values = jax.jit(lambda: jax.lax.scan(step, variables, batches))()
    checkpointed = jax.jit(partial(step, wrapped=jax.checkpoint))
    state = variables
    for batch, value in zip(batches, values, strict=True):
        state, found = checkpointed(state, batch)
        assert found == pytest.approx(float(value), rel=1e-10)
    assert_close_in_norm(scanned, state, 1e-10)


@pytest.mark.parametrize(("kind", "implementation"), kinds_by_both("squeeze_excitation"))
def test_any_number_of_images_can_be_exported(kind, implementation):
    model = network(kind, implementation)
    variables, x, _ = drawn_for(model, batch=3)

    @jax.jit
    def infer(x):
        return model.apply(variables, x, train=False)

    shape = export.symbolic_shape(f"b, {SIDE}, {SIDE}, 3")
    exported = export.export(infer)(jax.ShapeDtypeStruct(shape, x.dtype))
    for number in (1, 3):
        assert_close_in_norm(exported.call(x[:number]), infer(x[:number]), 1e-12)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("kind", [long("plain"), "resnet_d"])
def test_images_of_any_size_can_be_exported(kind, implementation):
    model = network(kind, implementation)
    variables, x, _ = drawn_for(model)

    @jax.jit
    def features(x):
        return model.apply(variables, x, train=False, return_features=True)

    shape = export.symbolic_shape("b, 8*h, 8*w, 3")  # multiples of the stride
    exported = export.export(features)(jax.ShapeDtypeStruct(shape, x.dtype))
    for images in (x, jnp.concatenate([x, x], axis=2)):
        assert_close_in_norm(exported.call(images), features(images), 1e-12)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("basic", {"stem": "cifar", "shortcut": "A"}),
        ("resnet_d", {"stem": "cifar"}),
        long("bottleneck", {}),
    ],
)
def test_images_need_not_be_multiples_of_the_stride_to_be_exported(kind, overrides):
    model = network(kind, "auto", **overrides)
    variables, x, _ = drawn_for(model)

    @jax.jit
    def infer(x):
        return model.apply(variables, x, train=False)

    shape = export.symbolic_shape("b, h, w, 3")
    exported = export.export(infer)(jax.ShapeDtypeStruct(shape, x.dtype))
    for images in (x, x[:1, :13, :10]):
        assert_close_in_norm(exported.call(images), infer(images), 1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_training_and_gradients_can_be_exported_for_any_batch(train):
    model = network("squeeze_excitation")
    variables, x, _ = drawn_for(model)
    slope = jax.jit(jax.value_and_grad(loss_of(model, variables, train), has_aux=True))
    shape = export.symbolic_shape(f"b, {SIDE}, {SIDE}, 3")
    exported = export.export(slope)(variables["params"], jax.ShapeDtypeStruct(shape, x.dtype))
    at = variables["params"], x
    assert_close_in_norm(exported.call(*at), slope(*at), 1e-10)


@pytest.mark.parametrize(("kind", "implementation"), kinds_by_both("preact_basic"))
def test_nnx_trains_the_same(kind, implementation):
    model = network(kind, implementation)
    variables, x, _ = drawn_for(model)

    @nnx.jit
    def initialized(x):
        return bridge.lazy_init(bridge.ToNNX(model, rngs=nnx.Rngs(0)), x, train=False)

    def flat(module, kind):
        return dict(nnx.to_flat_state(nnx.state(module, kind)))

    module = initialized(x)
    for kind_of, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        values = flatten_dict(variables.get(collection, {}))
        found = flat(module, kind_of)
        assert {*found} == {*values}
        new = [(path, variable.replace(values[path])) for path, variable in found.items()]
        nnx.update(module, nnx.from_flat_state(new))

    @nnx.jit
    def slope(module, x):
        def value(module):
            return jnp.sin(module(x, train=True, mutable=["batch_stats"])).sum()

        return nnx.grad(value)(module)

    loss = loss_of(model, variables)
    expected, (_, updated) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], x)
    found = {path: leaf[...] for path, leaf in nnx.to_flat_state(slope(module, x))}
    assert_close_in_norm(found, flatten_dict(expected), 1e-10)
    moved = {path: leaf[...] for path, leaf in flat(module, nnx.BatchStat).items()}
    assert_close_in_norm(moved, flatten_dict(updated.get("batch_stats", {})), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_can_be_tabulated_and_pickled(kind):
    model = network(kind, "xla")
    table = model.tabulate(
        jax.random.key(0),
        jnp.ones((1, SIDE, SIDE, 3)),
        train=False,
        console_kwargs={"width": 200},
        depth=1,
    )
    shapes = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), jnp.ones((1, SIDE, SIDE, 3))
    )
    number = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert f"{number:,}" in table
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    assert again.implementation == "xla"
    assert again != model.clone(implementation="auto")

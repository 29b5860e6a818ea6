"""Winograd's algorithm: its rounding, its runs over large maps, its second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm, compiled_value_and_vjp

from resnet_flax.ops import conv2d, dispatch, winograd

ONE = ((1, 1), (1, 1))
PARTS = dispatch.ConvImplementation._fields


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2.5e-3), ("float32", 2e-6)])
def test_winograd_keeps_the_digits_of_its_type(dtype, tolerance):
    rng = np.random.default_rng(0)
    shapes = (2, 14, 14, 64), (3, 3, 64, 64)
    exact = [jnp.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]

    def run(implementation, *operands):
        with dispatch.override(**dict.fromkeys(PARTS, implementation)):
            return compiled_value_and_vjp(lambda x, k: conv2d(x, k, padding=ONE), *operands)

    found = run("winograd", *exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    expected = run("tap_matmul", *(leaf.astype(jnp.float64) for leaf in exact))
    assert_close_in_norm(
        [leaf.astype(jnp.float64) for leaf in jax.tree.leaves(found)], expected, tolerance
    )


@pytest.mark.usefixtures("x64")
def test_winograd_takes_large_maps_in_runs_of_rows(monkeypatch):
    # Shapes that only this test has: traces of other tests would be reused.
    monkeypatch.setattr(winograd, "RUN", 1)
    rng = np.random.default_rng(0)

    def convolved(implementation, *operands):
        with dispatch.override(**dict.fromkeys(PARTS, implementation)):
            return compiled_value_and_vjp(
                lambda x, k: conv2d(x, k, padding=((1, 2), (0, 0))), *operands
            )

    def loops(*operands):
        return str(jax.make_jaxpr(lambda *o: convolved("winograd", *o))(*operands)).count("scan[")

    # One row of tiles at a time; two rows forward, the last tiles with zeros; no row at all.
    for batch, loops_ in ((4, 3), (2, 3), (0, 0)):
        shapes = (batch, 14, 11, 3), (3, 3, 3, 4)
        operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        assert loops(*operands) == loops_
        assert_close_in_norm(
            convolved("winograd", *operands), convolved("tap_matmul", *operands), 1e-13
        )
    many = winograd.FEW_CHANNELS + 1
    assert loops(jnp.zeros((many, 15, 11, 3)), jnp.zeros((3, 3, 3, many))) == 2


@pytest.mark.usefixtures("x64")
def test_winograd_has_second_derivatives():
    rng = np.random.default_rng(0)
    x, k, v = (jnp.asarray(rng.normal(size=s)) for s in ((2, 5, 6, 3), (3, 3, 3, 4), (3, 3, 3, 4)))

    def product(implementation):
        def loss(k):
            with dispatch.override(**dict.fromkeys(PARTS, implementation)):
                return (conv2d(x, k, padding=ONE) ** 3).sum()

        return jax.jit(jax.grad(lambda k: (jax.grad(loss)(k) * v).sum()))(k)

    assert_close_in_norm(product("winograd"), product("tap_matmul"), 1e-12)

"""Every implementation of max pooling has the values and gradients of Flax's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm, value_and_vjp
from flax import linen as nn

from resnet_flax.ops import dispatch, max_pool

ONE = ((1, 1), (1, 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (3, 4), (12, 5)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["pooling"])
def test_with_and_without_ties(size, ceil, implementation):
    padding = [(0, (n - 3) % 2) for n in size] if ceil else ONE
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 3, (2, *size, 5))
    assert (ties == 2).mean() > 0.25

    @jax.jit
    def ours(x):
        with dispatch.override(pooling=implementation):
            return value_and_vjp(partial(max_pool, ceil=ceil), x)

    flax = jax.jit(partial(value_and_vjp, lambda x: nn.max_pool(x, (3, 3), (2, 2), padding)))
    for x in (rng.normal(size=ties.shape), ties, np.zeros(ties.shape), -1.0 - ties):
        x = jnp.asarray(x, jnp.float64)
        assert_close_in_norm(ours(x), flax(x), 1e-14)


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["pooling"])
def test_nan_propagates(implementation):
    x = jnp.zeros((1, 8, 8, 1)).at[0, 4, 4, 0].set(jnp.nan)
    with dispatch.override(pooling=implementation):
        y, vjp = jax.vjp(max_pool, x)
        assert jnp.isnan(y).sum() == jnp.isnan(max_pool(x)).sum() == 1
        assert jnp.isfinite(vjp(jnp.ones_like(y))[0]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS["pooling"])
def test_second_derivatives_go_to_the_first_of_ties(implementation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(1, 3, (1, 8, 8, 2)), jnp.float64)
    v = jnp.asarray(rng.normal(size=x.shape))

    def product(pool):
        """A Hessian-vector product of the sum of cubes."""
        slope = jax.grad(lambda x: (pool(x) ** 3).sum())
        return jax.jit(jax.grad(lambda x: (slope(x) * v).sum()))(x)

    with dispatch.override(pooling=implementation):
        actual = product(max_pool)
    assert_close_in_norm(actual, product(lambda x: nn.max_pool(x, (3, 3), (2, 2), ONE)), 1e-14)

"""Comparisons of two computations of the same values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def assert_close_in_norm(actual, expected, tolerance):
    """For each leaf, the difference's norm is within `tolerance` times the expected leaf's norm."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def assert_close_at_every_element(actual, expected, tolerance):
    """For each leaf, no element differs by more than `tolerance` times the largest expected one."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float(jnp.abs(a - b).max()) <= tolerance * float(jnp.abs(b).max())


def value_and_vjp(function, *operands):
    """A function's value, and its gradients for random cotangents that are the same each time."""
    y, vjp = jax.vjp(function, *operands)
    rng = np.random.default_rng(7)
    return y, vjp(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), y)
    )


def compiled_value_and_vjp(function, *operands):
    """`value_and_vjp` as one program."""
    return jax.jit(partial(value_and_vjp, function))(*operands)

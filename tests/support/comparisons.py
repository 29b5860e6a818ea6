"""How two computations of the same are compared."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def assert_close_in_norm(actual, expected, tolerance):
    """Of each leaf the Euclidean norm of the difference is within `tolerance` of the expected."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def assert_close_at_every_element(actual, expected, tolerance):
    """Of each leaf no element differs by more than `tolerance` of the largest expected one."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float(jnp.abs(a - b).max()) <= tolerance * float(jnp.abs(b).max())


def value_and_vjp(function, *operands):
    """What a function returns, and its gradients for drawn cotangents, the same at each call."""
    y, vjp = jax.vjp(function, *operands)
    rng = np.random.default_rng(7)
    return y, vjp(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), y)
    )


def compiled_value_and_vjp(function, *operands):
    """`value_and_vjp` as one program."""
    return jax.jit(partial(value_and_vjp, function))(*operands)

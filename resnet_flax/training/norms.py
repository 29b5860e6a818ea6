"""Norms for the log."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from resnet_flax import sharding
from resnet_flax.ops import dispatch
from resnet_flax.ops.dispatch import ByDevice


def tree_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm of all elements of a tree, computed leaf by leaf."""
    return jnp.asarray(optax.tree.norm(tree))


def norm_over(mesh: Mesh) -> Callable[[Any], Float[Array, ""]]:
    """The fastest implementation of `tree_norm` for parameters on this mesh.

    On a GPU that is over all leaves concatenated: leaf by leaf, XLA makes a kernel for each leaf's
    sum, hundreds that run for microseconds, and fuses sums into the optimiser's kernels, which then
    take longer too. It is not used if leaves are sharded, as it would gather them.
    """
    if mesh.shape[sharding.FSDP] > 1:
        return tree_norm
    by_device = ByDevice(tree_norm, _norm_of_one, tree_norm)

    def norm(tree: Any) -> Float[Array, ""]:
        # Without batch normalisation there are no statistics.
        return dispatch.call(by_device, tree) if jax.tree.leaves(tree) else tree_norm(tree)

    return norm


def _norm_of_one(tree: Any) -> Float[Array, ""]:
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    return jnp.sqrt(jnp.square(flat).sum())

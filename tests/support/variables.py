"""Variables of networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def initialised(model, x):
    """Initialises in one program; otherwise each operation would be compiled separately."""
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), x)


def drawn(model, x):
    """Random variables without compiling an initialisation, for tests of something else."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path[-1].key != "kernel":
            return jnp.zeros(leaf.shape, leaf.dtype)
        fan_out = np.prod(leaf.shape[-4:]) / leaf.shape[-2]
        return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_out), leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)

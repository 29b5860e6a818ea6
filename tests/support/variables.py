"""Variables of networks."""

from functools import partial

import jax


def initialised(model, x):
    """By one program; operation by operation each would be compiled by itself."""
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), x)

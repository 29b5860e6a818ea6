"""Operands of a 3x3 convolution and the batch normalisation of its output."""

import jax.numpy as jnp
import numpy as np

ONE = ((1, 1), (1, 1))


def fused_3x3_operands(batch, side, channels, features, stride, residual, dtype=np.float64):
    """For `conv_batch_norm_3x3`: input, kernel, scale, bias and residual; running statistics."""
    rng = np.random.default_rng(0)
    shapes = [(batch, side, side, channels), (3, 3, channels, features), features, features]
    x, kernel, scale, bias = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    added = jnp.asarray(rng.normal(size=(batch, side // stride, side // stride, features)))
    running = jnp.asarray(rng.normal(size=features)), jnp.asarray(rng.uniform(1, 2, features))
    maps = x.astype(dtype), added.astype(dtype) if residual else None
    return (maps[0], kernel, scale, bias, maps[1]), running

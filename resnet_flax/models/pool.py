"""Pooling with explicit padding."""

from flax import linen as nn
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The stem's: 3x3 windows, stride 2, one position of minus infinity around."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

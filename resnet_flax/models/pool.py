"""Pooling with explicit padding."""

from flax import linen as nn
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "b h w c"], ceil: bool = False) -> Float[Array, "b h2 w2 c"]:
    """The stem's: 3x3 windows, stride 2.

    Args:
      x: of any size.
      ceil: as Caffe has it, windows from the very edge and one more where the last would leave
        positions over; else one position of minus infinity around.
    """
    sides = x.shape[1:3]
    # Output ceil((n - 3) / 2) + 1: an even side lacks one position.
    padding = [(0, (n - 3) % 2) for n in sides] if ceil else [(1, 1), (1, 1)]
    return nn.max_pool(x, (3, 3), (2, 2), padding)

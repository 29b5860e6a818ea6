"""Residual blocks and the three shortcuts of the paper."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

SHORTCUTS = ("A", "B", "C", "none")


class Shortcut(nn.Module):
    """What is added to a block's residual branch (He et al. 2015, section 3.3 and table 3).

    Option A has no parameters: the identity, taken at every `strides`-th position and padded
    with zero channels where the shape changes. B projects (1x1 convolution and normalisation)
    where the shape changes; C always.

    Attributes:
      option: 'A', 'B' or 'C'.
      features: output channels.
      strides: the block's stride.
      conv: makes a convolution from features, kernel size and strides.
      norm: makes a normalisation.
    """

    option: str
    features: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 f"]:
        """The block's input in the shape of its output."""
        same = self.strides == 1 and x.shape[-1] == self.features
        if same and self.option != "C":
            return x
        if self.option == "A":
            x = x[:, :: self.strides, :: self.strides]
            # Half on either side, as the published CIFAR weights have it; all on one side would
            # be the same network up to a permutation of channels.
            extra = self.features - x.shape[-1]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        x = self.conv(self.features, (1, 1), strides=self.strides, name="conv")(x)
        return self.norm(name="norm")(x, train)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each normalised, and the shortcut (He et al. 2015, figure 5 left).

    Attributes:
      features: output channels.
      strides: of the first convolution.
      shortcut: one of `SHORTCUTS`; with 'none' the block is two layers of a plain network.
      conv: makes a convolution from features, kernel size and strides.
      norm: makes a normalisation.
    """

    features: int
    strides: int
    shortcut: str
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 f"]:
        """The block's output; `train` as for `BatchNorm`."""
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.conv(self.features, (3, 3), name="conv2")(y)
        y = self.norm(name="norm2")(y, train)
        if self.shortcut != "none":
            skip = Shortcut(
                self.shortcut, self.features, self.strides, self.conv, self.norm, name="shortcut"
            )
            y = y + skip(x, train)
        return nn.relu(y)

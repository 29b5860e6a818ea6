"""The stem: one or three convolutions, and max pooling for large images."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from resnet_flax.models.conv_norm import conv_norm
from resnet_flax.ops import max_pool


class Stem(nn.Module):
    """The layers before the first stage.

    Attributes:
      kind: 'cifar', 'imagenet' or 'deep', see `ResNet`.
      features: output channels; the first two convolutions of a deep stem have half as many.
      last_norm: normalise and activate after the last convolution too.
      pool: see `ResNet.stem_pool`.
      conv: makes a convolution.
      norm: makes a normalisation.
      implementation: of the pooling, see `ResNet`.
    """

    kind: str
    features: int
    last_norm: bool
    pool: str
    conv: Any
    norm: Any
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 f"]:
        """The input of the first stage."""
        if self.kind == "deep":
            half = self.features // 2
            layers: Any = ((half, 3, 2), (half, 3, 1), (self.features, 3, 1))
        else:
            layers = ((self.features, 7, 2) if self.kind == "imagenet" else (self.features, 3, 1),)
        for i, (width, side, strides) in enumerate(layers, start=1):
            normed = self.last_norm or i < len(layers)
            conv = self.conv(width, (side, side), strides=strides, name=f"conv{i}")
            if normed:
                x = conv_norm(conv, self.norm(name=f"norm{i}"), x, train, activate=True)
            else:
                x = conv(x)
        return x if self.kind == "cifar" else max_pool(x, self.pool == "ceil", self.implementation)

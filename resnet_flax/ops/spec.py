"""What is static about an operation: geometry and numbers, known when a program is traced."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


class ConvSpec(NamedTuple):
    """Of a convolution, see `conv.conv2d`."""

    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1


def is_pointwise(kernel: Sequence[int], geometry: ConvSpec) -> bool:
    """Whether a convolution is a matrix product at (some of) the positions."""
    unpadded = geometry.padding == ((0, 0), (0, 0))
    return tuple(kernel[:2]) == (1, 1) and unpadded and geometry.groups == 1


def output_size(x: Sequence[int], kernel: Sequence[int], geometry: ConvSpec) -> Pair:
    """Height and width of what a convolution makes."""
    height, width = (
        (n + low + high - (k - 1) * d - 1) // s + 1
        for n, k, s, (low, high), d in zip(
            x[1:3], kernel[:2], geometry.strides, geometry.padding, geometry.dilation, strict=True
        )
    )
    return height, width


class NormalizedConv(NamedTuple):
    """A convolution whose output is normalised.

    Attributes:
      positions: of its output, in one image.
      kernel: shape of its kernel, HWIO.
      geometry: the rest.
      dtype: of the computation.
      batch: images.
      parameters: type of the kernel.
    """

    positions: int
    kernel: Sequence[int]
    geometry: ConvSpec
    dtype: Any
    batch: int = 1
    parameters: Any = np.float32

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at (some of) the positions."""
        return is_pointwise(self.kernel, self.geometry)

"""Static parameters of operations, known when a program is traced."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.dispatch import BatchNormImplementation, ByDevice

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Shape = tuple[Any, ...]  # ints, or symbolic dimensions of `jax.export`


class ConvSpec(NamedTuple):
    """The geometry of a convolution, see `conv.conv2d`."""

    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1


def is_symbolic(shape: Sequence[Any]) -> bool:
    """Whether a dimension is not a number, but any number, in a trace for `jax.export`."""
    return not all(isinstance(n, int | np.integer) for n in shape)


def is_pointwise(kernel: Sequence[Any], spec: ConvSpec) -> bool:
    """Whether a convolution is a matrix product at (some of) the positions."""
    unpadded = spec.padding == ((0, 0), (0, 0))
    return tuple(kernel[:2]) == (1, 1) and unpadded and spec.groups == 1


def output_size(x: Sequence[Any], kernel: Sequence[Any], spec: ConvSpec) -> Pair:
    """Height and width of a convolution's output."""
    height, width = (
        (n + low + high - (k - 1) * d - 1) // s + 1
        for n, k, s, (low, high), d in zip(
            x[1:3], kernel[:2], spec.strides, spec.padding, spec.dilation, strict=True
        )
    )
    return height, width


class NormalizedConv(NamedTuple):
    """A convolution whose output is normalised.

    Attributes:
      positions: number of positions of its output, in one image.
      kernel: shape of its kernel, HWIO.
      spec: its geometry.
      dtype: of the computation.
      batch: number of images.
      param_dtype: of the kernel.
    """

    positions: int
    kernel: Sequence[Any]
    spec: ConvSpec
    dtype: Any
    batch: int = 1
    param_dtype: Any = np.float32

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at (some of) the positions."""
        return is_pointwise(self.kernel, self.spec)


class BatchNormSpec(NamedTuple):
    """The static parameters of batch normalisation in training.

    Attributes:
      groups: number of groups of examples, which are normalised separately.
      epsilon: added to the variance.
      activate: apply a ReLU after it.
      dtype: of the output.
      param_dtype: of parameters and statistics.
      implementations: how it is computed.
      momentum: fraction of a running statistic that is kept.
      bessel_correction: factor of a variance before it is averaged.
    """

    groups: int
    epsilon: float
    activate: bool
    dtype: Any
    param_dtype: Any
    implementations: ByDevice[BatchNormImplementation]
    momentum: float = 0.9
    bessel_correction: float = 1.0

    def update_running(
        self, mean: Array, var: Array, running: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """The running statistics after a batch.

        Args:
          mean: `[groups, c]`, of the batch.
          var: `[groups, c]`, of the batch.
          running: running means and variances before the batch, `[c]`.
        """
        pairs = zip(running, (mean, var * self.bessel_correction), strict=True)
        found = (self.momentum * old + (1 - self.momentum) * now.mean(0) for old, now in pairs)
        moved_mean, moved_var = (lax.stop_gradient(new) for new in found)
        return moved_mean, moved_var

    def grouped(self, x: Array) -> Array:
        """`[groups, b / groups, h, w, c]`, in the type of the computation."""
        return x.astype(self.param_dtype).reshape(self.groups, -1, *x.shape[1:])

"""Convolution with explicit padding, and gradients that every backend runs fast."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resnet_flax.models import lowering
from resnet_flax.models.conv_ways import FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT
from resnet_flax.models.lowering import Behind, ByDevice, Convolution, Geometry, Padding, Pair

Dtype = Any

# Zero-mean normal with variance 2 / (kernel area * output channels): He et al. 2015,
# "Delving Deep into Rectifiers", eq. 14, which keeps the gradients' scale through the depth.
he_normal: Callable[..., Array] = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Two-dimensional cross-correlation, as `lax.conv_general_dilated` in NHWC and HWIO.

    The values are those of `lax.conv_general_dilated`, and so are the gradients; how they are
    computed is `lowering`'s choice. Being a `jax.custom_vjp`, it has reverse-mode derivatives (of
    any order), no forward-mode.

    Args:
      x: images or feature maps.
      kernel: `i` is the number of input channels of one group.
      strides: step between output positions, in pixels.
      padding: zeros before and after, for height and width. Explicit, never 'SAME': that pads
        even sizes differently from every published network.
      dilation: spacing of the kernel's taps, in pixels.
      groups: number of groups of channels that see only each other.
    """
    geometry = Geometry(strides, padding, dilation, groups)
    ways = lowering.convolution(x.shape, kernel.shape, geometry, x.dtype)
    return _conv2d(geometry, ways, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv2d(geometry: Geometry, ways: ByDevice[Convolution], x: Array, kernel: Array) -> Array:
    functions = ways.map(lambda way: way.forward).map(lambda way: partial(FORWARD[way], geometry))
    return lowering.call(functions, x, kernel)


def _forward(geometry, ways, x, kernel):  # type: ignore[no-untyped-def]
    return _conv2d(geometry, ways, x, kernel), (x, kernel)


def _backward(geometry, ways, residuals, dy):  # type: ignore[no-untyped-def]
    def gradients(way: Convolution) -> Callable[..., tuple[Array, Array]]:
        def both(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
            dx = INPUT_GRADIENT[way.input_gradient](geometry, x.shape, kernel, dy)
            return dx, KERNEL_GRADIENT[way.kernel_gradient](geometry, kernel.shape, x, dy)

        return both

    return lowering.call(ways.map(gradients), *residuals, dy)


_conv2d.defvjp(_forward, _backward)


class Pending(NamedTuple):
    """A convolution that is left to the normalisation behind it, which may do without its output.

    Attributes:
      x: the input `[b, h, w, c]`.
      kernel: `[kh, kw, c, o]`, which is to be of the type of `x`.
      geometry: the rest.
    """

    x: Array
    kernel: Array
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the output, `[b, h2, w2, o]`."""
        h, w = lowering.output_size(self.x.shape, self.kernel.shape, self.geometry)
        return len(self.x), h, w, self.kernel.shape[3]

    @property
    def behind(self) -> Behind:
        """What decides how it is normalised."""
        _, h, w, _ = self.shape
        types = self.x.dtype, len(self.x), self.kernel.dtype
        return Behind(h * w, self.kernel.shape, self.geometry, *types)

    def computed(self) -> Float[Array, "b h2 w2 o"]:
        """The output."""
        return conv2d(self.x, self.kernel.astype(self.x.dtype), *self.geometry)


def computed(x: Array | Pending) -> Array:
    """A map, computed if it was not yet."""
    return x.computed() if isinstance(x, Pending) else x


class Conv(nn.Module):
    """A convolution; one parameter, `kernel` (HWIO), and `bias` where asked for.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: step between output positions.
      padding: zeros on every side; by default half the dilated kernel, so that an odd kernel at
        stride 1 keeps the size.
      dilation: spacing of the kernel's taps.
      groups: groups of channels (ResNeXt's cardinality).
      use_bias: add a bias; no use before a normalisation.
      dtype: type of the computation.
      param_dtype: type of the parameters.
    """

    features: int
    kernel_size: Sequence[int] = (3, 3)
    strides: int = 1
    padding: int | None = None
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], pending: bool = False
    ) -> Float[Array, "b h2 w2 features"] | Pending:
        """The convolution of `x`, computed in `dtype`.

        Args:
          x: feature maps.
          pending: leave it to the normalisation behind it where that may do without the output:
            then it is returned as `Pending`.
        """
        channels = x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {channels} input and the "
                f"{self.features} output channels of a convolution"
            )
        h, w = self.kernel_size
        kernel = self.param(
            "kernel", he_normal, (h, w, channels // self.groups, self.features), self.param_dtype
        )
        ph, pw = (
            self.dilation * (k - 1) // 2 if self.padding is None else self.padding for k in (h, w)
        )
        x = x.astype(self.dtype)
        geometry = Geometry(
            (self.strides, self.strides),
            ((ph, ph), (pw, pw)),
            (self.dilation, self.dilation),
            self.groups,
        )
        later = Pending(x, kernel, geometry)
        if pending and not self.use_bias and later.behind.may_join():
            return later
        y = later.computed()
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return y + bias.astype(self.dtype)

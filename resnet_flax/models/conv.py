"""Convolution with explicit padding, and gradients that every backend runs fast."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

Dtype = Any
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Zero-mean normal with variance 2 / (kernel area * output channels): He et al. 2015,
# "Delving Deep into Rectifiers", eq. 14, which keeps the gradients' scale through the depth.
he_normal: Callable[..., Array] = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    x: Array, kernel: Array, strides: Pair, padding: Padding, dilation: Pair, groups: int
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def _input_gradient(
    dy: Array,
    kernel: Array,
    size: tuple[int, ...],
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    g: int,
) -> Array:
    """Convolves `dy`, spread out by the strides, with the kernel turned by 180 degrees."""
    h, w, i, o = kernel.shape  # i is per group
    turned = kernel[::-1, ::-1].reshape(h, w, i, g, o // g)
    turned = turned.transpose(0, 1, 4, 3, 2).reshape(h, w, o // g, g * i)
    pads = []
    for k, d, s, (low, _), n_in, n_out in zip(
        (h, w), dilation, strides, padding, size, dy.shape[1:3], strict=True
    ):
        reach = (k - 1) * d
        spread = (n_out - 1) * s + 1
        # low may be negative here; XLA crops then. high makes the output n_in long.
        pads.append((reach - low, n_in - spread + low))
    return lax.conv_general_dilated(
        dy,
        turned,
        window_strides=(1, 1),
        padding=pads,
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=g,
    )


def _kernel_gradient(
    x: Array,
    dy: Array,
    area: tuple[int, ...],
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    g: int,
) -> Array:
    """Convolves `x` with `dy` as the kernel, the batch taking the place of the channels."""
    n, _, _, c = x.shape
    o = dy.shape[-1]
    images = x.reshape(*x.shape[:3], g, c // g).transpose(4, 1, 2, 3, 0)
    images = images.reshape(c // g, *x.shape[1:3], g * n)
    kernels = dy.transpose(1, 2, 0, 3)  # [h, w, n, o]; o is already group-major
    pads = []
    for k, d, s, (low, _), n_in, n_out in zip(
        area, dilation, strides, padding, x.shape[1:3], dy.shape[1:3], strict=True
    ):
        # The output must have k positions, d apart; what the stride never reached is cropped.
        pads.append((low, (k - 1) * d + (n_out - 1) * s + 1 - n_in - low))
    out = lax.conv_general_dilated(
        images,
        kernels,
        window_strides=dilation,
        padding=pads,
        rhs_dilation=strides,
        dimension_numbers=DIMENSIONS,
        feature_group_count=g,
    )
    return out.reshape(c // g, *area, o).transpose(1, 2, 0, 3)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Two-dimensional cross-correlation, as `lax.conv_general_dilated` in NHWC and HWIO.

    The values are those of `lax.conv_general_dilated`, and so are the gradients. On the CPU both
    gradients are written as convolutions in NHWC and HWIO themselves: in a loop (a scan over
    blocks, gradient accumulation, several steps to a dispatch) XLA's CPU backend runs a
    convolution in any other layout 8 to 40 times slower. Elsewhere JAX's own gradients are
    used, whose form the GPU and TPU compilers recognise. The choice is made when the program is
    lowered, so that compiling ahead for another device is right too.

    Being a `jax.custom_vjp`, it has reverse-mode derivatives (of any order), no forward-mode.

    Args:
      x: images or feature maps.
      kernel: `i` is the number of input channels of one group.
      strides: step between output positions, in pixels.
      padding: zeros before and after, for height and width. Explicit, never 'SAME': that pads
        even sizes differently from every published network.
      dilation: spacing of the kernel's taps, in pixels.
      groups: number of groups of channels that see only each other.
    """
    return _conv(x, kernel, strides, padding, dilation, groups)


def _conv_forward(x, kernel, strides, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return _conv(x, kernel, strides, padding, dilation, groups), (x, kernel)


def _conv_backward(strides, padding, dilation, groups, residuals, dy):  # type: ignore[no-untyped-def]
    def canonical(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        at = (strides, padding, dilation, groups)
        dx = _input_gradient(dy, kernel, x.shape[1:3], *at)
        return dx, _kernel_gradient(x, dy, kernel.shape[:2], *at)

    def native(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        at = (strides, padding, dilation, groups)
        return jax.vjp(lambda x, kernel: _conv(x, kernel, *at), x, kernel)[1](dy)

    return lax.platform_dependent(*residuals, dy, cpu=canonical, default=native)


conv2d.defvjp(_conv_forward, _conv_backward)


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
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        """The convolution of `x`, computed in `dtype`."""
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
        y = conv2d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.strides, self.strides),
            ((ph, ph), (pw, pw)),
            (self.dilation, self.dilation),
            self.groups,
        )
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return y + bias.astype(self.dtype)

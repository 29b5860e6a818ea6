"""Convolutions and their gradients by XLA's own convolution.

The gradients are those that JAX derives (`native`), or convolutions in NHWC and HWIO whatever the
forward pass is (`canonical`), which are fast on XLA's CPU backend.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.spec import ConvSpec, Shape

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Forward = Callable[[ConvSpec, Array, Array], Array]
Gradient = Callable[[ConvSpec, Shape, Array, Array], Array]


def conv(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """Convolves `x` `[b, h, w, c]` with `[kh, kw, c / groups, o]` to `[b, h2, w2, o]`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=spec.strides,
        padding=spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=spec.groups,
    )


def native_input_gradient(forward: Forward) -> Gradient:
    """The gradient of a convolution to its input, as JAX derives it.

    Args:
      forward: the convolution, which is linear in its input.

    Returns:
      A function of the spec, the input's shape, the kernel and the gradient to the output.
    """

    def gradient(spec: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
        x = jax.ShapeDtypeStruct(size, dy.dtype)
        return jax.linear_transpose(lambda x: forward(spec, x, kernel), x)(dy)[0]

    return gradient


def native_kernel_gradient(forward: Forward) -> Gradient:
    """The gradient of a convolution to its kernel, as JAX derives it.

    Args:
      forward: the convolution, which is linear in its kernel.

    Returns:
      A function of the spec, the kernel's shape, the input and the gradient to the output.
    """

    def gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
        kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda kernel: forward(spec, x, kernel), kernel)(dy)[0]

    return gradient


def canonical_input_gradient(spec: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """Convolves `dy`, dilated by the strides, with the kernel rotated by 180 degrees."""
    strides, padding, dilation, g = spec
    h, w, i, o = kernel.shape  # i is per group
    turned = kernel[::-1, ::-1].reshape(h, w, i, g, o // g)
    turned = turned.transpose(0, 1, 4, 3, 2).reshape(h, w, o // g, g * i)
    pads = []
    for k, d, s, (low, _), n_in, n_out in zip(
        (h, w), dilation, strides, padding, size[1:3], dy.shape[1:3], strict=True
    ):
        reach = (k - 1) * d
        spread = (n_out - 1) * s + 1
        # low may be negative, which crops in XLA. high makes the output n_in long.
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


def canonical_kernel_gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """Convolves `x` with `dy` as the kernel, with the batch in place of the channels."""
    strides, padding, dilation, g = spec
    area = shape[:2]
    n, _, _, c = x.shape
    o = dy.shape[-1]
    images = x.reshape(*x.shape[:3], g, c // g).transpose(4, 1, 2, 3, 0)
    images = images.reshape(c // g, *x.shape[1:3], g * n)
    kernels = dy.transpose(1, 2, 0, 3)  # [h, w, n, o]; o is already group-major
    pads = []
    for k, d, s, (low, _), n_in, n_out in zip(
        area, dilation, strides, padding, x.shape[1:3], dy.shape[1:3], strict=True
    ):
        # The output must have k positions, d apart; inputs that the stride never reached are
        # cropped.
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


def float32_kernel_gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """`canonical_kernel_gradient`, computed in float32 if the operands have 16 bits."""
    wide = np.promote_types(x.dtype, np.float32)
    return canonical_kernel_gradient(spec, shape, x.astype(wide), dy.astype(wide)).astype(x.dtype)

"""Convolution with explicit padding, and gradients that are fast on every backend."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from resnet_flax.ops import conv_matmul, conv_reshape, conv_xla, dispatch, heuristics, winograd
from resnet_flax.ops.conv_xla import Forward, Gradient
from resnet_flax.ops.dispatch import ByDevice, ConvImplementation
from resnet_flax.ops.linear import linear
from resnet_flax.ops.spec import ConvSpec, Padding, Pair

# Keyed by the names in `dispatch.ConvImplementation`.
FORWARD: dict[str, Forward] = {
    "conv": conv_xla.conv,
    "dot": conv_matmul.dot,
    "tap_matmul": conv_matmul.tap_matmul,
    "space_to_depth": conv_reshape.space_to_depth,
    "width_to_channels": conv_reshape.width_to_channels,
    "winograd": winograd.convolve,
}
INPUT_GRADIENT: dict[str, Gradient] = {
    "native": conv_xla.native_input_gradient(conv_xla.conv),
    "canonical": conv_xla.canonical_input_gradient,
    "dot": conv_matmul.dot_input_gradient,
    "tap_matmul": conv_matmul.tap_matmul_input_gradient,
    "polyphase": conv_reshape.polyphase_input_gradient,
    "width_to_channels": conv_xla.native_input_gradient(conv_reshape.width_to_channels),
    "winograd": winograd.input_gradient,
}
KERNEL_GRADIENT: dict[str, Gradient] = {
    "native": conv_xla.native_kernel_gradient(conv_xla.conv),
    "canonical": conv_xla.canonical_kernel_gradient,
    "float32": conv_xla.float32_kernel_gradient,
    "dot": conv_matmul.dot_kernel_gradient,
    "tap_matmul": conv_matmul.tap_matmul_kernel_gradient,
    "row_im2col": conv_matmul.row_im2col_kernel_gradient,
    "space_to_depth": conv_xla.native_kernel_gradient(conv_reshape.space_to_depth),
    "width_to_channels": conv_xla.native_kernel_gradient(conv_reshape.width_to_channels),
    "winograd": winograd.kernel_gradient,
}


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    groups: int = 1,
    implementation: str = "auto",
) -> Float[Array, "b h2 w2 o"]:
    """Two-dimensional cross-correlation, as `lax.conv_general_dilated` in NHWC and HWIO.

    Values and derivatives are those of `lax.conv_general_dilated`; `heuristics` chooses how they
    are computed.

    Args:
      x: images or feature maps.
      kernel: `i` is the number of input channels of one group.
      strides: step between output positions, in pixels.
      padding: zeros before and after, for height and width. Explicit, never 'SAME', which pads even
        sizes differently from all published networks.
      dilation: spacing of the kernel's taps, in pixels.
      groups: number of groups of channels, which are convolved separately.
      implementation: 'auto', or 'xla' for `lax.conv_general_dilated` itself: JAX and the programs
        that read its traces then find neither rules of our own nor a choice by platform.
    """
    spec = ConvSpec(strides, padding, dilation, groups)
    if implementation == "xla":
        return conv_xla.conv(spec, x, kernel)
    implementations = heuristics.conv_implementation(x.shape, kernel.shape, spec, x.dtype)
    return _conv2d(spec, implementations, x, kernel)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _conv2d(
    spec: ConvSpec, implementations: ByDevice[ConvImplementation], x: Array, kernel: Array
) -> Array:
    functions = implementations.map(lambda chosen: chosen.forward).map(
        lambda chosen: partial(FORWARD[chosen], spec)
    )
    return dispatch.call(functions, x, kernel)


@partial(_conv2d.defjvp, symbolic_zeros=True)
def _derivative(spec, implementations, operands, tangents):  # type: ignore[no-untyped-def]
    y = _conv2d(spec, implementations, *operands)
    tangent, gradients = (partial(part, spec, implementations) for part in (_tangent, _gradients))
    return y, linear(tangent, gradients, operands, tangents, y)


def _tangent(spec, implementations, operands, tangents):  # type: ignore[no-untyped-def]
    (x, kernel), (dx, dkernel) = operands, tangents
    conv = partial(_conv2d, spec, implementations)
    terms = [] if dx is None else [conv(dx, kernel)]
    terms += [] if dkernel is None else [conv(x, dkernel)]
    return sum(terms[1:], terms[0])


def _gradients(spec, implementations, operands, dy):  # type: ignore[no-untyped-def]
    def gradients(chosen: ConvImplementation) -> Callable[..., tuple[Array, Array]]:
        def both(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
            dx = INPUT_GRADIENT[chosen.input_gradient](spec, x.shape, kernel, dy)
            return dx, KERNEL_GRADIENT[chosen.kernel_gradient](spec, kernel.shape, x, dy)

        return both

    return dispatch.call(implementations.map(gradients), *operands, dy)

"""Convolution with explicit padding, and gradients that every backend runs fast."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from resnet_flax.ops import dispatch, heuristics
from resnet_flax.ops.conv_implementations import FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT
from resnet_flax.ops.dispatch import ByDevice, ConvImplementation
from resnet_flax.ops.spec import ConvSpec, Padding, Pair


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
    computed is `heuristics`' choice. Being a `jax.custom_vjp`, it has reverse-mode derivatives (of
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
    geometry = ConvSpec(strides, padding, dilation, groups)
    implementations = heuristics.convolution(x.shape, kernel.shape, geometry, x.dtype)
    return _conv2d(geometry, implementations, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv2d(
    geometry: ConvSpec, implementations: ByDevice[ConvImplementation], x: Array, kernel: Array
) -> Array:
    functions = implementations.map(lambda chosen: chosen.forward).map(
        lambda chosen: partial(FORWARD[chosen], geometry)
    )
    return dispatch.call(functions, x, kernel)


def _forward(geometry, implementations, x, kernel):  # type: ignore[no-untyped-def]
    return _conv2d(geometry, implementations, x, kernel), (x, kernel)


def _backward(geometry, implementations, residuals, dy):  # type: ignore[no-untyped-def]
    def gradients(chosen: ConvImplementation) -> Callable[..., tuple[Array, Array]]:
        def both(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
            dx = INPUT_GRADIENT[chosen.input_gradient](geometry, x.shape, kernel, dy)
            return dx, KERNEL_GRADIENT[chosen.kernel_gradient](geometry, kernel.shape, x, dy)

        return both

    return dispatch.call(implementations.map(gradients), *residuals, dy)


_conv2d.defvjp(_forward, _backward)

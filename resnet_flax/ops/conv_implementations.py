"""Implementations of a convolution and its two gradients, which `heuristics` chooses from."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.ops import winograd
from resnet_flax.ops.conv_reshape import DIMENSIONS, columns, space_to_depth
from resnet_flax.ops.spec import ConvSpec, Pair, output_size

Shape = tuple[int, ...]
Forward = Callable[[ConvSpec, Array, Array], Array]
Gradient = Callable[[ConvSpec, Shape, Array, Array], Array]


def _conv(geometry: ConvSpec, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=geometry.strides,
        padding=geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=geometry.groups,
    )


# As JAX derives them ----------------------------------------------------------------------------


def _input_gradient_of(forward: Forward) -> Gradient:
    def gradient(geometry: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
        x = jax.ShapeDtypeStruct(size, dy.dtype)
        return jax.linear_transpose(lambda x: forward(geometry, x, kernel), x)(dy)[0]

    return gradient


def _kernel_gradient_of(forward: Forward) -> Gradient:
    def gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
        kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda kernel: forward(geometry, x, kernel), kernel)(dy)[0]

    return gradient


# As convolutions in NHWC and HWIO ---------------------------------------------------------------


def _canonical_input_gradient(geometry: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """Convolves `dy`, spread out by the strides, with the kernel turned by 180 degrees."""
    strides, padding, dilation, g = geometry
    h, w, i, o = kernel.shape  # i is per group
    turned = kernel[::-1, ::-1].reshape(h, w, i, g, o // g)
    turned = turned.transpose(0, 1, 4, 3, 2).reshape(h, w, o // g, g * i)
    pads = []
    for k, d, s, (low, _), n_in, n_out in zip(
        (h, w), dilation, strides, padding, size[1:3], dy.shape[1:3], strict=True
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


def _canonical_kernel_gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """Convolves `x` with `dy` as the kernel, the batch taking the place of the channels."""
    strides, padding, dilation, g = geometry
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


def _widened_kernel_gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """`_canonical_kernel_gradient`, of 16 bits in 32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _canonical_kernel_gradient(geometry, shape, x.astype(wide), dy.astype(wide)).astype(
        x.dtype
    )


# As matrix products -----------------------------------------------------------------------------


def _product(x: Array, matrix: Array, dtype: Any = None) -> Array:
    """`[..., c]` times `[c, o]`, given in `dtype`."""
    over = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, matrix, over, preferred_element_type=dtype)


def _wide(x: Array) -> Any:
    """What sums of several products are taken in: in bfloat16 each addition would be rounded."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _outer(x: Array, dy: Array) -> Array:
    """`[c, o]`, the sum over all positions of the products of `[..., c]` and `[..., o]`."""
    # In two dimensions: with more, XLA's CPU compiler makes a transposed copy of the map.
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


def _dot(geometry: ConvSpec, x: Array, kernel: Array) -> Array:
    high, wide = geometry.strides
    return _product(x[:, ::high, ::wide], kernel[0, 0])


def _dot_input_gradient(geometry: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    return _spread(_product(dy, kernel[0, 0].T), size, geometry.strides, (0, 0))


def _dot_kernel_gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    high, wide = geometry.strides
    return _outer(x[:, ::high, ::wide], dy).reshape(shape)


def _spread(dy: Array, size: Shape, strides: Pair, offsets: Pair) -> Array:
    """`dy` at every `strides`-th position from `offsets`, zeros between; cropped to `size`."""
    pads = [(0, 0, 0)]
    for n_in, n_out, s, low in zip(size[1:3], dy.shape[1:3], strides, offsets, strict=True):
        pads.append((low, n_in - low - (n_out - 1) * s - 1, s - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), [*pads, (0, 0, 0)])


# As a matrix product for each position of the kernel --------------------------------------------


def _offsets(geometry: ConvSpec, area: Shape) -> Iterator[tuple[int, int]]:
    """Of each tap: where in the padded input it meets the first output."""
    for i in range(area[0]):
        for j in range(area[1]):
            yield i * geometry.dilation[0], j * geometry.dilation[1]


def _padded(geometry: ConvSpec, x: Array) -> Array:
    pads = [(0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _under(tap: Pair, geometry: ConvSpec, padded: Array, out: Shape) -> Array:
    """What a tap sees, `[b, h2, w2, c]`."""
    (i, j), (high, wide) = tap, geometry.strides
    return padded[
        :,
        i : i + (out[0] - 1) * high + 1 : high,
        j : j + (out[1] - 1) * wide + 1 : wide,
    ]


def _taps(geometry: ConvSpec, x: Array, kernel: Array) -> Array:
    area = kernel.shape[:2]
    padded = _padded(geometry, x)
    out = output_size(x.shape, kernel.shape, geometry)
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    products = [
        _product(_under(tap, geometry, padded, out), matrix, _wide(x))
        for tap, matrix in zip(_offsets(geometry, area), matrices, strict=True)
    ]
    return sum(products[1:], products[0]).astype(x.dtype)


def _taps_input_gradient(geometry: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    (top, _), (left, _) = geometry.padding
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    pieces = [
        _spread(_product(dy, matrix.T, _wide(dy)), size, geometry.strides, (i - top, j - left))
        for (i, j), matrix in zip(_offsets(geometry, kernel.shape[:2]), matrices, strict=True)
    ]
    return sum(pieces[1:], pieces[0]).astype(dy.dtype)


def _taps_kernel_gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    padded = _padded(geometry, x)
    pieces = [
        _outer(_under(tap, geometry, padded, dy.shape[1:3]), dy)
        for tap in _offsets(geometry, shape[:2])
    ]
    return jnp.stack(pieces).reshape(shape)


def _rows_kernel_gradient(geometry: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """A product for each row of the kernel, its taps side by side: of few channels each is thin."""
    padded, width = _padded(geometry, x), shape[1]
    seen = [_under(tap, geometry, padded, dy.shape[1:3]) for tap in _offsets(geometry, shape[:2])]
    rows = (jnp.concatenate(seen[i : i + width], -1) for i in range(0, len(seen), width))
    return jnp.stack([_outer(row, dy) for row in rows]).reshape(shape)


# As a convolution for each residue of the input's positions -------------------------------------


def _phases_input_gradient(geometry: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """Input row r = s u + a meets the taps k with k = a + low modulo s, at output u + const."""
    high, wide = geometry.strides
    rows, columns = -(-size[1] // high), -(-size[2] // wide)
    phases = [
        [_phase(geometry, (a, b), (rows, columns), kernel, dy) for b in range(wide)]
        for a in range(high)
    ]
    interleaved = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
    whole = interleaved.reshape(size[0], rows * high, columns * wide, size[3])
    return whole[:, : size[1], : size[2]]


def _phase(geometry: ConvSpec, phase: Pair, number: Pair, kernel: Array, dy: Array) -> Array:
    (top, _), (left, _) = geometry.padding
    high, wide = geometry.strides
    first = ((phase[0] + top) % high, (phase[1] + left) % wide)
    part = kernel[first[0] :: high, first[1] :: wide][::-1, ::-1].swapaxes(2, 3)
    if 0 in part.shape:
        return jnp.zeros((dy.shape[0], *number, kernel.shape[2]), dy.dtype)
    pads = []
    for k, s, low, a, tap, n, n_out in zip(
        part.shape[:2], (high, wide), (top, left), phase, first, number, dy.shape[1:3], strict=True
    ):
        # The last of the phase's taps, here the first, meets this output at the first position.
        output = (a + low - tap) // s - (k - 1)
        pads.append((-output, n - 1 + output + (k - 1) - (n_out - 1)))
    return lax.conv_general_dilated(dy, part, (1, 1), pads, dimension_numbers=DIMENSIONS)


FORWARD: dict[str, Forward] = {
    "conv": _conv,
    "dot": _dot,
    "tap_matmul": _taps,
    "space_to_depth": space_to_depth,
    "width_to_channels": columns,
    "winograd": winograd.convolve,
}
INPUT_GRADIENT: dict[str, Gradient] = {
    "native": _input_gradient_of(_conv),
    "canonical": _canonical_input_gradient,
    "dot": _dot_input_gradient,
    "tap_matmul": _taps_input_gradient,
    "polyphase": _phases_input_gradient,
    "width_to_channels": _input_gradient_of(columns),
    "winograd": winograd.input_gradient,
}
KERNEL_GRADIENT: dict[str, Gradient] = {
    "native": _kernel_gradient_of(_conv),
    "canonical": _canonical_kernel_gradient,
    "float32": _widened_kernel_gradient,
    "dot": _dot_kernel_gradient,
    "tap_matmul": _taps_kernel_gradient,
    "row_im2col": _rows_kernel_gradient,
    "space_to_depth": _kernel_gradient_of(space_to_depth),
    "width_to_channels": _kernel_gradient_of(columns),
    "winograd": winograd.kernel_gradient,
}

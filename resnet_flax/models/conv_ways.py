"""The ways to compute a convolution and its two gradients, which `lowering` chooses from."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.models import winograd
from resnet_flax.models.lowering import Geometry, Pair, columns_in_one, output_size

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Shape = tuple[int, ...]
CHANNELS_AT_A_TIME = 8  # of a GPU's tensor cores, in bfloat16


def _conv(geometry: Geometry, x: Array, kernel: Array) -> Array:
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


def _native_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
    x = jax.ShapeDtypeStruct(size, dy.dtype)
    return jax.linear_transpose(lambda x: _conv(geometry, x, kernel), x)(dy)[0]


def _native_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda kernel: _conv(geometry, x, kernel), kernel)(dy)[0]


# As convolutions in NHWC and HWIO ---------------------------------------------------------------


def _canonical_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
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


def _canonical_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
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


def _dot(geometry: Geometry, x: Array, kernel: Array) -> Array:
    high, wide = geometry.strides
    return _product(x[:, ::high, ::wide], kernel[0, 0])


def _dot_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
    return _spread(_product(dy, kernel[0, 0].T), size, geometry.strides, (0, 0))


def _dot_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    high, wide = geometry.strides
    return _outer(x[:, ::high, ::wide], dy).reshape(shape)


def _spread(dy: Array, size: Shape, strides: Pair, offsets: Pair) -> Array:
    """`dy` at every `strides`-th position from `offsets`, zeros between; cropped to `size`."""
    pads = [(0, 0, 0)]
    for n_in, n_out, s, low in zip(size[1:3], dy.shape[1:3], strides, offsets, strict=True):
        pads.append((low, n_in - low - (n_out - 1) * s - 1, s - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), [*pads, (0, 0, 0)])


# As a matrix product for each position of the kernel --------------------------------------------


def _offsets(geometry: Geometry, area: Shape) -> Iterator[tuple[int, int]]:
    """Of each tap: where in the padded input it meets the first output."""
    for i in range(area[0]):
        for j in range(area[1]):
            yield i * geometry.dilation[0], j * geometry.dilation[1]


def _padded(geometry: Geometry, x: Array) -> Array:
    pads = [(0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _under(tap: Pair, geometry: Geometry, padded: Array, out: Shape) -> Array:
    """What a tap sees, `[b, h2, w2, c]`."""
    (i, j), (high, wide) = tap, geometry.strides
    return padded[
        :,
        i : i + (out[0] - 1) * high + 1 : high,
        j : j + (out[1] - 1) * wide + 1 : wide,
    ]


def _taps(geometry: Geometry, x: Array, kernel: Array) -> Array:
    area = kernel.shape[:2]
    padded = _padded(geometry, x)
    out = output_size(x.shape, kernel.shape, geometry)
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    products = [
        _product(_under(tap, geometry, padded, out), matrix, _wide(x))
        for tap, matrix in zip(_offsets(geometry, area), matrices, strict=True)
    ]
    return sum(products[1:], products[0]).astype(x.dtype)


def _taps_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
    (top, _), (left, _) = geometry.padding
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    pieces = [
        _spread(_product(dy, matrix.T, _wide(dy)), size, geometry.strides, (i - top, j - left))
        for (i, j), matrix in zip(_offsets(geometry, kernel.shape[:2]), matrices, strict=True)
    ]
    return sum(pieces[1:], pieces[0]).astype(dy.dtype)


def _taps_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    padded = _padded(geometry, x)
    pieces = [
        _outer(_under(tap, geometry, padded, dy.shape[1:3]), dy)
        for tap in _offsets(geometry, shape[:2])
    ]
    return jnp.stack(pieces).reshape(shape)


def _rows_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    """A product for each row of the kernel, its taps side by side: of few channels each is thin."""
    padded, width = _padded(geometry, x), shape[1]
    seen = [_under(tap, geometry, padded, dy.shape[1:3]) for tap in _offsets(geometry, shape[:2])]
    rows = (jnp.concatenate(seen[i : i + width], -1) for i in range(0, len(seen), width))
    return jnp.stack([_outer(row, dy) for row in rows]).reshape(shape)


# As a convolution for each residue of the input's positions -------------------------------------


def _phases_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
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


def _phase(geometry: Geometry, phase: Pair, number: Pair, kernel: Array, dy: Array) -> Array:
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


# As a convolution without strides, each square of positions for one with more channels ---------


def _space_to_depth(geometry: Geometry, x: Array, kernel: Array) -> Array:
    """Output u is the sum of x[s u + k] K[k]; with k = s a + b, of x[s (u + a) + b] K[s a + b]."""
    pads, over, squares = [(0, 0, 0)], [], []
    for n, k, s, (low, high) in zip(
        x.shape[1:3], kernel.shape[:2], geometry.strides, geometry.padding, strict=True
    ):
        out = (n + low + high - k) // s + 1
        taps = -(-k // s)
        pads.append((low, s * (out - 1 + taps) - n - low, 0))
        over.append((0, s * taps - k))
        squares += [out - 1 + taps, s]
    x = lax.pad(x, jnp.zeros((), x.dtype), [*pads, (0, 0, 0)])
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, *squares, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(kernel, (*over, (0, 0), (0, 0)))
    high, wide = geometry.strides
    area = kernel.shape[0] // high, kernel.shape[1] // wide
    kernel = kernel.reshape(area[0], high, area[1], wide, *kernel.shape[2:])
    return _filled_conv(
        x.reshape(b, squares[0], squares[2], high * wide * c),
        kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*area, high * wide * c, -1),
        "VALID",
    )


def _filled_conv(x: Array, kernel: Array, padding: Any) -> Array:
    """A convolution of as many channels as tensor cores take at a time, zeros in the last."""
    more = -x.shape[-1] % CHANNELS_AT_A_TIME
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=DIMENSIONS)


def _space_to_depth_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda kernel: _space_to_depth(geometry, x, kernel), kernel)(dy)[0]


# As a convolution of fewer columns with more channels -------------------------------------------


def _columns(geometry: Geometry, x: Array, kernel: Array) -> Array:
    """Several columns side by side as channels of one, for maps of few channels.

    With g columns to one, output column g a + q is channel q of a. It takes input column
    g a + q + t, t from minus the padding on, which is channel p of a + s where g s + p = q + t.
    """
    h, w, i, o = kernel.shape
    g = columns_in_one(x.shape[2], o)
    b, rows, columns, _ = x.shape
    reach = -(-(w // 2) // g)  # columns of g that a kernel sees on either side
    wide = (2 * reach + 1) * g
    bands = [
        jnp.pad(kernel, ((0, 0), (first, wide - w - first), (0, 0), (0, 0)))
        for first in (reach * g + q - w // 2 for q in range(g))
    ]
    kernel = jnp.stack(bands, -2).reshape(h, 2 * reach + 1, g * i, g * o)
    pads = (geometry.padding[0], (reach, reach))
    y = _filled_conv(x.reshape(b, rows, columns // g, g * i), kernel, pads)
    return y.reshape(b, y.shape[1], columns, o)


def _columns_input_gradient(geometry: Geometry, size: Shape, kernel: Array, dy: Array) -> Array:
    x = jax.ShapeDtypeStruct(size, dy.dtype)
    return jax.linear_transpose(lambda x: _columns(geometry, x, kernel), x)(dy)[0]


def _columns_kernel_gradient(geometry: Geometry, shape: Shape, x: Array, dy: Array) -> Array:
    kernel = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda kernel: _columns(geometry, x, kernel), kernel)(dy)[0]


FORWARD: dict[str, Callable[[Geometry, Array, Array], Array]] = {
    "conv": _conv,
    "dot": _dot,
    "taps": _taps,
    "space_to_depth": _space_to_depth,
    "columns": _columns,
    "winograd": winograd.convolve,
}
INPUT_GRADIENT: dict[str, Callable[[Geometry, Shape, Array, Array], Array]] = {
    "native": _native_input_gradient,
    "canonical": _canonical_input_gradient,
    "dot": _dot_input_gradient,
    "taps": _taps_input_gradient,
    "phases": _phases_input_gradient,
    "columns": _columns_input_gradient,
    "winograd": winograd.input_gradient,
}
KERNEL_GRADIENT: dict[str, Callable[[Geometry, Shape, Array, Array], Array]] = {
    "native": _native_kernel_gradient,
    "canonical": _canonical_kernel_gradient,
    "dot": _dot_kernel_gradient,
    "taps": _taps_kernel_gradient,
    "rows": _rows_kernel_gradient,
    "space_to_depth": _space_to_depth_kernel_gradient,
    "columns": _columns_kernel_gradient,
    "winograd": winograd.kernel_gradient,
}

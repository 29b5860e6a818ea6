"""Convolutions and their gradients as matrix products.

A 1x1 convolution is one product (`dot`), one with a larger kernel a product for each tap
(`tap_matmul`) or for each row of the kernel (`row_im2col`).
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.spec import ConvSpec, Pair, Shape, output_size


def _product(x: Array, matrix: Array, dtype: Any = None) -> Array:
    """`[..., c]` times `[c, o]`, as `dtype`."""
    over = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, matrix, over, preferred_element_type=dtype)


def _wide(x: Array) -> Any:
    """The type to sum several products in: in bfloat16 each addition would be rounded."""
    return np.promote_types(x.dtype, np.float32)


def _outer(x: Array, dy: Array) -> Array:
    """`[c, o]`, the sum over all positions of the products of `[..., c]` and `[..., o]`."""
    # In two dimensions: with more, XLA's CPU compiler makes a transposed copy of the map.
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


def dot(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """A 1x1 convolution `[b, h2, w2, o]` as one product over all positions."""
    high, wide = spec.strides
    return _product(x[:, ::high, ::wide], kernel[0, 0])


def dot_input_gradient(spec: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """The gradient of `dot` to its input of shape `size`; zero where the stride skips."""
    return _spread(_product(dy, kernel[0, 0].T), size, spec.strides, (0, 0))


def dot_kernel_gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """The gradient of `dot` to its kernel of `shape` `[1, 1, c, o]`."""
    high, wide = spec.strides
    return _outer(x[:, ::high, ::wide], dy).reshape(shape)


def _spread(dy: Array, size: Shape, strides: Pair, offsets: Pair) -> Array:
    """`dy` at every `strides`-th position from `offsets`, zeros between; cropped to `size`."""
    pads = [(0, 0, 0)]
    for n_in, n_out, s, low in zip(size[1:3], dy.shape[1:3], strides, offsets, strict=True):
        pads.append((low, n_in - low - (n_out - 1) * s - 1, s - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), [*pads, (0, 0, 0)])


# Larger kernels ---------------------------------------------------------------------------------


def _offsets(spec: ConvSpec, area: Shape) -> Iterator[tuple[int, int]]:
    """For each tap: its position in the padded input for the first output."""
    for i in range(area[0]):
        for j in range(area[1]):
            yield i * spec.dilation[0], j * spec.dilation[1]


def _padded(spec: ConvSpec, x: Array) -> Array:
    pads = [(0, 0, 0), *((low, high, 0) for low, high in spec.padding), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _under(tap: Pair, spec: ConvSpec, padded: Array, out: Shape) -> Array:
    """The inputs that a tap multiplies, `[b, h2, w2, c]`."""
    (i, j), (high, wide) = tap, spec.strides
    return padded[
        :,
        i : i + (out[0] - 1) * high + 1 : high,
        j : j + (out[1] - 1) * wide + 1 : wide,
    ]


def tap_matmul(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """The convolution `[b, h2, w2, o]` as the sum of a product for each tap of the kernel."""
    area = kernel.shape[:2]
    padded = _padded(spec, x)
    out = output_size(x.shape, kernel.shape, spec)
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    products = [
        _product(_under(tap, spec, padded, out), matrix, _wide(x))
        for tap, matrix in zip(_offsets(spec, area), matrices, strict=True)
    ]
    return sum(products[1:], products[0]).astype(x.dtype)


def tap_matmul_input_gradient(spec: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """The gradient to the input of shape `size`, as the sum of a product for each tap."""
    (top, _), (left, _) = spec.padding
    matrices = kernel.reshape(-1, *kernel.shape[2:])
    pieces = [
        _spread(_product(dy, matrix.T, _wide(dy)), size, spec.strides, (i - top, j - left))
        for (i, j), matrix in zip(_offsets(spec, kernel.shape[:2]), matrices, strict=True)
    ]
    return sum(pieces[1:], pieces[0]).astype(dy.dtype)


def tap_matmul_kernel_gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """The gradient to the kernel of `shape` `[kh, kw, c, o]`, a product for each tap."""
    padded = _padded(spec, x)
    pieces = [
        _outer(_under(tap, spec, padded, dy.shape[1:3]), dy) for tap in _offsets(spec, shape[:2])
    ]
    return jnp.stack(pieces).reshape(shape)


def row_im2col_kernel_gradient(spec: ConvSpec, shape: Shape, x: Array, dy: Array) -> Array:
    """The gradient to the kernel, one product for each of its rows, whose taps are concatenated.

    With few channels the product of a single tap would be too narrow to be fast.
    """
    padded, width = _padded(spec, x), shape[1]
    seen = [_under(tap, spec, padded, dy.shape[1:3]) for tap in _offsets(spec, shape[:2])]
    rows = (jnp.concatenate(seen[i : i + width], -1) for i in range(0, len(seen), width))
    return jnp.stack([_outer(row, dy) for row in rows]).reshape(shape)

"""3x3 convolutions without strides by Winograd's minimal filtering, where arithmetic is dear.

F(2 x 2, 3 x 3) of Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks". Along
one axis, two outputs of a filter of three, which see four inputs, take four products instead of
six; along both, sixteen instead of thirty-six. A product is that of two matrices, for all tiles of
2 x 2 outputs and all channels at once, so there are sixteen of these in a convolution and in each
of its gradients. The price is maps with four times the elements, which come and go within.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.models.lowering import Geometry, Padding, output_size

Parts = Sequence[Array]
Rows = list[Array]
"""By row of a tile, its columns along the first axis: maps `[4, b, rows of tiles, columns of tiles,
c]`, matrices `[4, c, o]`."""

ROWS, COLUMNS = 1, 2  # of maps
CHANNELS, FEATURES = 1, 2  # of matrices


def convolve(geometry: Geometry, x: Array, kernel: Array) -> Array:
    """The convolution.

    Args:
      geometry: the padding; without stride, dilation and groups.
      x: `[b, h, w, c]`.
      kernel: `[3, 3, c, o]`.

    Returns:
      `[b, h2, w2, o]`.
    """
    size = output_size(x.shape, kernel.shape, geometry)
    maps = _of_inputs(_wide(x), geometry.padding, size)
    products = map(partial(_products, over=CHANNELS), maps, _of_kernel(_wide(kernel)))
    rows = [_side_by_side(_outputs(row), COLUMNS) for row in products]
    y = _side_by_side(_outputs(rows), ROWS)
    return y[:, : size[0], : size[1]].astype(x.dtype)


def input_gradient(geometry: Geometry, size: Sequence[int], kernel: Array, dy: Array) -> Array:
    """The gradient of `convolve` to its input.

    Args:
      geometry: as of `convolve`.
      size: the input's shape, `[b, h, w, c]`.
      kernel: `[3, 3, c, o]`.
      dy: the gradient to the output, `[b, h2, w2, o]`.
    """
    maps = _of_gradients(_wide(dy))
    products = map(partial(_products, over=FEATURES), maps, _of_kernel(_wide(kernel)))
    rows = [_overlapping(_inputs_gradient(row), COLUMNS) for row in products]
    dx = _overlapping(_inputs_gradient(rows), ROWS)
    cropped = [
        (-low, n + low - whole)
        for n, (low, _), whole in zip(size[1:3], geometry.padding, dx.shape[1:3], strict=True)
    ]
    return _padded(dx, cropped).astype(dy.dtype)


def kernel_gradient(geometry: Geometry, shape: Sequence[int], x: Array, dy: Array) -> Array:
    """The gradient of `convolve` to its kernel, of `shape` `[3, 3, c, o]`; the rest as above."""
    maps = _of_inputs(_wide(x), geometry.padding, dy.shape[1:3])
    products = list(map(_outer_products, maps, _of_gradients(_wide(dy))))
    taps = [tap for row in _kernel_gradient(products) for tap in _kernel_gradient(row)]
    return jnp.stack(taps).reshape(shape).astype(x.dtype)


# Both axes --------------------------------------------------------------------------------------


def _of_inputs(x: Array, padding: Padding, size: Sequence[int]) -> Rows:
    pads = []
    for n, out, (low, _) in zip(x.shape[1:3], size, padding, strict=True):
        pads.append((low, out + out % 2 + 2 - low - n))
    rows = _inputs(_seen(_padded(x, pads), ROWS))
    return [jnp.stack(_inputs(_seen(row, COLUMNS))) for row in rows]


def _of_kernel(kernel: Array) -> Rows:
    return [jnp.stack(_kernel(row)) for row in _kernel(kernel)]


def _of_gradients(dy: Array) -> Rows:
    dy = _padded(dy, [(0, n % 2) for n in dy.shape[1:3]])
    rows = _outputs_gradient(_alternating(dy, ROWS))
    return [jnp.stack(_outputs_gradient(_alternating(row, COLUMNS))) for row in rows]


def _products(maps: Array, matrices: Array, over: int) -> Array:
    """Along the matrices' axis `over`."""
    product = _batched(_flat(maps), matrices, (2, over))
    return product.reshape(*maps.shape[:-1], product.shape[-1])


def _outer_products(maps: Array, gradients: Array) -> Array:
    """Summed over tiles, `[4, c, o]`."""
    return _batched(_flat(maps), _flat(gradients), (1, 1))


def _batched(x: Array, y: Array, over: tuple[int, int]) -> Array:
    return lax.dot_general(x, y, ((over[:1], over[1:]), ((0,), (0,))))


def _flat(maps: Array) -> Array:
    return maps.reshape(4, math.prod(maps.shape[1:-1]), maps.shape[-1])


# The transforms along one axis, of lists or of arrays along their first -------------------------


def _inputs(parts: Parts | Array) -> Parts:
    a, b, c, d = parts
    return a - c, b + c, c - b, b - d


def _inputs_gradient(parts: Parts | Array) -> Parts:
    a, b, c, d = parts
    return a, b - c + d, b + c - a, -d


def _kernel(taps: Parts | Array) -> Parts:
    a, b, c = taps
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _kernel_gradient(parts: Parts | Array) -> Parts:
    a, b, c, d = parts
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _outputs(parts: Parts | Array) -> Parts:
    a, b, c, d = parts
    return a + b + c, b - c - d


def _outputs_gradient(parts: Parts | Array) -> Parts:
    a, b = parts
    return a, a + b, a - b, -b


# Tiles along one axis ---------------------------------------------------------------------------


def _seen(x: Array, axis: int) -> Parts:
    """The four positions that each tile sees; the next tile sees the last two as well."""
    last = x.shape[axis] - 3
    return [lax.slice_in_dim(x, k, k + last, 2, axis) for k in range(4)]


def _overlapping(parts: Parts, axis: int) -> Array:
    """The gradient of `_seen`."""
    a, b, c, d = parts

    def met(first: Array, margin: Array) -> Array:
        return _shifted(first, axis, 0) + _shifted(margin, axis, 1)

    return _side_by_side([met(a, c), met(b, d)], axis)


def _shifted(x: Array, axis: int, by: int) -> Array:
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (by, 1 - by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _alternating(x: Array, axis: int) -> Parts:
    """The first and the second positions of the tiles."""
    return [lax.slice_in_dim(x, k, None, 2, axis) for k in range(2)]


def _side_by_side(parts: Parts, axis: int) -> Array:
    """The inverse of `_alternating`."""
    shape = list(parts[0].shape)
    shape[axis] *= 2
    return jnp.stack(parts, axis + 1).reshape(shape)


def _padded(x: Array, pads: Sequence[tuple[int, int]]) -> Array:
    spatial = [(low, high, 0) for low, high in pads]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _wide(x: Array) -> Array:
    """In bfloat16 each sum of the transforms would be rounded."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

"""3x3 convolutions without strides by Winograd's algorithm, where arithmetic is expensive.

F(4 x 4, 3 x 3) of Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks". Along
one axis, four outputs of a filter of three, which see six inputs, take six products instead of
twelve; along both, 36 instead of 144. Each product is a matrix product over all tiles of 4 x 4
outputs and all channels, so a convolution and each of its gradients have 36 of these. The cost is
temporary maps with 2.25 times the elements, and rounding: in float32, errors of about 2e-6 of a
sum's norm instead of 4e-7.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.spec import ConvSpec, Pair, output_size

Parts = Sequence[Array]
Matrix = Sequence[Sequence[int | float]]

TILE = 4  # outputs along an axis
SEEN = TILE + 2  # inputs

# The outputs of one tile are OUTPUTS ((KERNEL g) * (INPUTS d)) for inputs d and a filter g: values
# of polynomials at 0, 1, -1, 2, -2 and infinity.
INPUTS: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL: Matrix = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUTS: Matrix = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)

ROWS, COLUMNS = 1, 2  # of maps `[b, h, w, c]`
CHANNELS, FEATURES = 1, 2  # of the products' matrices `[36, c, o]`

# Elements of transformed maps that fit a CPU's cache; rows of tiles are processed in runs of this
# size.
RUN = 2**20
# Kernel gradients are computed in runs up to this number: 32 gained a third, 64 nothing.
FEW_CHANNELS = 32


# Jitted, so that each shape is traced once though a network has many.
@partial(jax.jit, static_argnums=0)
def convolve(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """The convolution.

    Args:
      spec: the padding; without stride, dilation and groups.
      x: `[b, h, w, c]`.
      kernel: `[3, 3, c, o]`.

    Returns:
      `[b, h2, w2, o]`.
    """
    size = output_size(x.shape, kernel.shape, spec)
    (top, _), (left, _) = spec.padding
    return _filter(x, kernel, CHANNELS, (top, left), size)


@partial(jax.jit, static_argnums=(0, 1))
def input_gradient(spec: ConvSpec, size: tuple[int, ...], kernel: Array, dy: Array) -> Array:
    """The gradient of `convolve` to its input: a convolution with the rotated kernel.

    Args:
      spec: see `convolve`.
      size: the input's shape, `[b, h, w, c]`.
      kernel: `[3, 3, c, o]`.
      dy: the gradient to the output, `[b, h2, w2, o]`.
    """
    (top, _), (left, _) = spec.padding
    turned = kernel[::-1, ::-1]
    return _filter(dy, turned, FEATURES, (2 - top, 2 - left), (size[1], size[2]))


@partial(jax.jit, static_argnums=(0, 1))
def kernel_gradient(spec: ConvSpec, shape: tuple[int, ...], x: Array, dy: Array) -> Array:
    """The gradient of `convolve` to its kernel of `shape` `[3, 3, c, o]`; see `input_gradient`."""
    size, tiles = dy.shape[1:3], _tiles(dy.shape[1:3])
    (top, _), (left, _) = spec.padding
    x_around = _around(_wide(x), (top, left), tiles)
    whole = [(0, TILE * t - n) for t, n in zip(tiles, size, strict=True)]
    dy_whole = _padded(_wide(dy), whole)

    def run(x: Array, dy: Array) -> Array:
        """Computes some rows of tiles."""
        maps = _both(INPUTS, _seen, x)
        gradients = _both(_transposed(OUTPUTS), _each, dy)
        return _products(maps, gradients, over=((1,), (1,)))

    # There are two temporary maps here, so a run has half as many rows. Over a batch on several
    # devices each run is all-reduced, 36 c o values; with more channels that is more, and runs are
    # no faster.
    few = max(shape[2:]) <= FEW_CHANNELS
    at_once = _rows_at_once(2 * x.shape[0] * tiles[1], tiles[0], *shape[2:]) if few else tiles[0]
    if at_once == tiles[0]:
        products = run(x_around, dy_whole)
    else:
        high = TILE * at_once

        def add(i: Array, products: Array) -> Array:
            seen = lax.dynamic_slice_in_dim(x_around, i * high, high + SEEN - TILE, ROWS)
            return products + run(seen, lax.dynamic_slice_in_dim(dy_whole, i * high, high, ROWS))

        none = jnp.zeros((SEEN**2, *shape[2:]), x_around.dtype)
        products = lax.fori_loop(0, tiles[0] // at_once, add, none)
    return _of_taps(_BOTH.T, products).reshape(shape).astype(x.dtype)


def _filter(x: Array, kernel: Array, over: int, low: Pair, size: Pair) -> Array:
    """`size` outputs of a 3x3 kernel `[3, 3, c, o]`, the first at `-low`; summed along `over`."""
    tiles = _tiles(size)
    padded = _around(_wide(x), low, tiles)
    matrices = _of_taps(_BOTH, _wide(kernel))
    features = kernel.shape[4 - over]
    shape = (x.shape[0], TILE * tiles[0], TILE * tiles[1], features)

    def run(padded: Array) -> Array:
        """Computes some rows of tiles."""
        maps = _both(INPUTS, _seen, padded)
        products = _products(maps, matrices, over=((2,), (over,)))
        products = products.reshape(*maps.shape[:-1], features)
        columns = jnp.stack(_times(OUTPUTS, products), 2 + COLUMNS)
        rows = jnp.stack(_times(OUTPUTS, columns), 1 + ROWS)
        return rows.reshape(shape[0], TILE * maps.shape[2 + ROWS], *shape[2:])

    at_once = _rows_at_once(x.shape[0] * tiles[1], tiles[0], *kernel.shape[2:])
    if at_once == tiles[0]:
        y = run(padded)
    else:
        high = TILE * at_once

        def put(i: Array, y: Array) -> Array:
            rows = run(lax.dynamic_slice_in_dim(padded, i * high, high + SEEN - TILE, ROWS))
            return lax.dynamic_update_slice_in_dim(y, rows, i * high, ROWS)

        y = lax.fori_loop(0, tiles[0] // at_once, put, jnp.zeros(shape, padded.dtype))
    return y[:, : size[0], : size[1]].astype(x.dtype)


def _rows_at_once(tiles_of_a_row: int, rows: int, channels: int, features: int) -> int:
    """How many rows of tiles a run has: all, or a divisor of their number."""
    # Each run reads all matrices again, so it should have many tiles.
    enough = max(RUN / (SEEN**2 * max(channels, features)), channels + features)
    divisors = (n for n in range(1, rows + 1) if rows % n == 0)
    return next((n for n in divisors if n * tiles_of_a_row >= enough), rows)


# Both axes --------------------------------------------------------------------------------------

# The kernel transform as one matrix over both axes, from taps to columns and rows.
_BOTH = np.einsum("ip,jq->jipq", KERNEL, KERNEL).reshape(SEEN**2, 9)


def _of_taps(matrix: np.ndarray, x: Array) -> Array:
    """A matrix, or its transpose, times arrays stacked by tap; `[36, c, o]` or `[9, c, o]`."""
    flat = x.reshape(matrix.shape[1], -1)
    return (jnp.asarray(matrix, x.dtype) @ flat).reshape(-1, *x.shape[-2:])


def _tiles(size: Sequence[int]) -> Pair:
    """The number of tiles along each axis."""
    return -(-size[0] // TILE), -(-size[1] // TILE)


def _around(x: Array, low: Pair, tiles: Pair) -> Array:
    """`x` padded and cropped to the tiles' inputs, the first from `-low` on."""
    pads = [
        (before, TILE * number + SEEN - TILE - before - n)
        for n, before, number in zip(x.shape[1:3], low, tiles, strict=True)
    ]
    return _padded(x, pads)


def _both(matrix: Matrix, cut: Callable[[Array, int], Parts], x: Array) -> Array:
    """A transform along both axes, to `[6, 6, b, rows of tiles, columns, c]` by column and row."""
    b, h, w, c = x.shape
    # With columns and channels as one axis, as loops along few channels are slow.
    rows = jnp.stack(_times(matrix, cut(x.reshape(b, h, w * c), ROWS)))
    rows = rows.reshape(*rows.shape[:-1], w, c)
    return jnp.stack(_times(matrix, cut(rows, 1 + COLUMNS)))


def _products(x: Array, y: Array, over: tuple[tuple[int], tuple[int]]) -> Array:
    """36 matrix products of `[36, tiles, c]` or `[36, c, o]`, summed along the axes `over`."""
    x, y = (part.reshape(SEEN**2, -1, part.shape[-1]) for part in (x, y))
    return lax.dot_general(x, y, (over, ((0,), (0,))))


# One axis ---------------------------------------------------------------------------------------


def _times(matrix: Matrix, parts: Parts | Array) -> list[Array]:
    """A matrix times a vector of arrays, or of an array's parts along its first axis."""
    return [
        reduce(
            operator.add,
            (
                part if factor == 1 else part * factor
                for factor, part in zip(row, parts, strict=True)
                if factor
            ),
        )
        for row in matrix
    ]


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _seen(x: Array, axis: int) -> Parts:
    """The six inputs of each tile; the next tile shares the last two."""
    last = x.shape[axis] - SEEN + 1
    return [lax.slice_in_dim(x, k, k + last, TILE, axis) for k in range(SEEN)]


def _each(x: Array, axis: int) -> Parts:
    """The four positions of each tile."""
    return [lax.slice_in_dim(x, k, None, TILE, axis) for k in range(TILE)]


def _padded(x: Array, pads: Sequence[Pair]) -> Array:
    spatial = [(low, high, 0) for low, high in pads]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _wide(x: Array) -> Array:
    """In float32 or more, as in bfloat16 each sum of the transforms would be rounded."""
    return x.astype(np.promote_types(x.dtype, np.float32))

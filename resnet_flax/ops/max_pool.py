"""Max pooling with explicit padding."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.ops import dispatch, heuristics
from resnet_flax.ops.dispatch import ByDevice, PoolImplementation, everywhere
from resnet_flax.ops.linear import linear
from resnet_flax.ops.spec import Padding, Pair

SIDE, STRIDE = 3, 2
HEIGHT, WIDTH = 1, 2  # axes


def max_pool(
    x: Float[Array, "b h w c"], ceil: bool = False, implementation: str = "auto"
) -> Float[Array, "b h2 w2 c"]:
    """The stem's max pooling: 3x3 windows, stride 2.

    If several positions of a window have the maximum, the gradient goes to the first of them in
    row-major order, as in JAX and torch. If a window contains NaN, it may go to any.

    Args:
      x: of any size.
      ceil: as in Caffe, no padding before, and one more window if positions would remain; otherwise
        padding of minus infinity by one position on each side.
      implementation: see `conv.conv2d`.
    """
    sides = x.shape[1:3]
    # Output ceil((n - 3) / 2) + 1: an even side lacks one position.
    padding = [(0, (n - 3) % 2) for n in sides] if ceil else [(1, 1), (1, 1)]
    pair = (padding[0], padding[1])
    if implementation == "xla":
        return _windows(pair, x)
    return _max_pool(pair, heuristics.pool_implementation(x.shape), x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _max_pool(padding: Padding, implementations: ByDevice[PoolImplementation], x: Array) -> Array:
    functions = {
        "native": partial(_windows, padding),
        "separable": partial(_by_axes, padding),
        "indexed": partial(_windows, padding),
    }
    return dispatch.call(implementations.map(lambda chosen: functions[chosen.pooling]), x)


@partial(_max_pool.defjvp, symbolic_zeros=True)
def _derivative(padding, implementations, operands, tangents):  # type: ignore[no-untyped-def]
    y, residuals = _forward(padding, implementations, *operands)
    tangent, gradients = partial(_tangent, padding), partial(_gradients, padding, implementations)
    return y, linear(tangent, gradients, residuals, tangents, y)


def _forward(padding, implementations, x):  # type: ignore[no-untyped-def]
    # Functions with this gradient themselves: `maximum` would split the gradient of ties.
    native, separable = (
        everywhere(PoolImplementation(pooling)) for pooling in ("native", "separable")
    )
    functions = {
        "native": partial(_without_taps, partial(_max_pool, padding, native)),
        "separable": partial(_without_taps, partial(_max_pool, padding, separable)),
        "indexed": partial(_with_taps, padding),
    }
    y, taps = dispatch.call(implementations.map(lambda chosen: functions[chosen.pooling]), x)
    return y, (x, y, taps)


def _gradients(padding, implementations, residuals, dy):  # type: ignore[no-untyped-def]
    functions = {
        "native": partial(_windows_gradient, padding),
        "separable": partial(_by_axes_gradient, padding),
        "indexed": partial(_gradient_by_taps, padding),
    }
    return (
        dispatch.call(
            implementations.map(lambda chosen: functions[chosen.pooling]), *residuals, dy
        ),
    )


def _windows(padding: Padding, x: Array) -> Array:
    window, strides = (1, SIDE, SIDE, 1), (1, STRIDE, STRIDE, 1)
    pads = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)


def _windows_gradient(padding: Padding, x: Array, y: Array, taps: Array, dy: Array) -> Array:
    del y, taps
    return jax.vjp(partial(_windows, padding), x)[1](dy)[0]


def _without_taps(function: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    y = function(x)
    return y, jnp.zeros(y.shape, jnp.uint8)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_taps(padding: Padding, x: Array) -> tuple[Array, Array]:
    """The maximum of each window, and its position in the window in row-major order."""
    windows = _of_windows(padding, x, -jnp.inf)
    y = next(windows)
    taps = jnp.zeros(y.shape, jnp.uint8)
    for number, tap in enumerate(windows, start=1):
        taps = jnp.where(tap > y, jnp.uint8(number), taps)
        y = jnp.maximum(y, tap)
    return y, taps


def _of_windows(padding: Padding, x: Array, outside: float) -> Iterator[Array]:
    """For each tap, the values of all windows."""
    pads = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    padded = lax.pad(x, jnp.array(outside, x.dtype), pads)
    ends = [STRIDE * ((n - SIDE) // STRIDE) + 1 for n in padded.shape[1:3]]
    for number in range(SIDE * SIDE):
        i, j = divmod(number, SIDE)
        yield padded[:, i : i + ends[0] : STRIDE, j : j + ends[1] : STRIDE]


@partial(_with_taps.defjvp, symbolic_zeros=True)
def _with_taps_derivative(padding, operands, tangents):  # type: ignore[no-untyped-def]
    y, taps = _with_taps(padding, *operands)
    tangent, gradient = partial(_tangent, padding), partial(_with_taps_gradient, padding)
    dy = linear(tangent, gradient, (*operands, y, taps), tangents, y)
    return (y, taps), (dy, np.zeros(taps.shape, jax.dtypes.float0))


def _with_taps_gradient(padding, residuals, dy):  # type: ignore[no-untyped-def]
    x, y, taps = residuals
    return (_gradient_by_taps(padding, x, y, taps, dy),)


def _tangent(padding, residuals, tangents):  # type: ignore[no-untyped-def]
    """The tangent of each window's maximum."""
    (x, _, _), (dx,) = residuals, tangents
    _, taps = _with_taps(padding, x)
    of_windows = enumerate(_of_windows(padding, dx, 0.0))
    zero = jnp.zeros((), dx.dtype)
    return sum(jnp.where(taps == number, tap, zero) for number, tap in of_windows)


def _gradient_by_taps(padding: Padding, x: Array, y: Array, taps: Array, dy: Array) -> Array:
    """The gradient of each position, from the at most four windows of which it is the maximum.

    Counted from the padded edge, position 2 a + e is tap e of window a, and where e is 0 also tap 2
    of window a - 1.
    """
    del y
    rows, columns = (n + 1 for n in dy.shape[1:3])
    pairs = (dy.shape[0], rows, STRIDE, columns, STRIDE, dy.shape[-1])

    def widened(array: Array, nothing: int) -> Array:
        """Pads the array before the first windows and after the last."""
        value = jnp.array(nothing, array.dtype)
        return lax.pad(array, value, [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])

    # In separate kernels: conditional loads would not be vectorised over channels.
    widened_taps = lax.optimization_barrier(widened(taps, 99))
    widened_dy = lax.optimization_barrier(widened(dy, 0))

    def under(array: Array, before: Pair) -> Array:
        """The values of window a, or a - 1, for pairs of positions."""
        (i, j) = (1 - one for one in before)
        array = array[:, i : i + rows, j : j + columns]
        return jnp.broadcast_to(array[:, :, None, :, None], pairs)

    def tap(before: int, dimension: int) -> Array:
        """The tap that position e is of that window; 9 for none."""
        e = lax.broadcasted_iota(jnp.int32, pairs, dimension)
        return (2 + 7 * e) if before else e

    dx = jnp.zeros(pairs, dy.dtype)
    for before in ((0, 0), (0, 1), (1, 0), (1, 1)):
        taken = under(widened_taps, before).astype(jnp.int32)
        mine = taken == SIDE * tap(before[0], 2) + tap(before[1], 4)
        dx = dx + jnp.where(mine, under(widened_dy, before), jnp.zeros((), dy.dtype))
    dx = dx.reshape(dy.shape[0], STRIDE * rows, STRIDE * columns, dy.shape[-1])
    for axis, (low, _) in zip((HEIGHT, WIDTH), padding, strict=True):
        dx = lax.slice_in_dim(dx, low, low + x.shape[axis], axis=axis)
    return dx


def _by_axes(padding: Padding, x: Array) -> Array:
    """The maximum of each row of a window, then the maximum of these."""
    return _along(HEIGHT, padding[0], _along(WIDTH, padding[1], x))


def _by_axes_gradient(padding: Padding, x: Array, y: Array, taps: Array, dy: Array) -> Array:
    """The gradient goes to the first row with the maximum, there to its first position."""
    del taps
    rows = _along(WIDTH, padding[1], x)
    drows = _along_gradient(HEIGHT, padding[0], rows, y, dy)
    return _along_gradient(WIDTH, padding[1], x, rows, drows)


def _along(axis: int, padding: Pair, x: Array) -> Array:
    first, second, third = _taps(axis, padding, x)
    return jnp.maximum(jnp.maximum(first, second), third)


def _along_gradient(axis: int, padding: Pair, x: Array, y: Array, dy: Array) -> Array:
    """`dy` at the first maximum of each window of three positions along an axis."""
    first, second, _ = _taps(axis, padding, x)
    in_first = first == y
    in_second = (second == y) & ~in_first
    zero = jnp.zeros((), dy.dtype)

    def at(inside: Array, later: int) -> Array:
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (later, 1 - later, 0)
        return lax.pad(jnp.where(inside, dy, zero), zero, pads)

    # A window's first position is even, and also the third one of the window before.
    even = at(in_first, 0) + at(~(in_first | in_second), 1)
    padded = jnp.stack([even, at(in_second, 0)], axis + 1)
    size = list(x.shape)
    size[axis] = STRIDE * even.shape[axis]
    low, n = padding[0], x.shape[axis]
    return lax.slice_in_dim(padded.reshape(size), low, low + n, axis=axis)


def _taps(axis: int, padding: Pair, x: Array) -> tuple[Array, Array, Array]:
    """The first, second and third positions of the windows along an axis."""
    n = x.shape[axis]
    out = (n + sum(padding) - SIDE) // STRIDE + 1
    # One extra pair of positions; its first one is in the last window.
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (padding[0], STRIDE * (out + 1) - n - padding[0], 0)
    padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
    pairs = padded.reshape(*x.shape[:axis], out + 1, STRIDE, *x.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(STRIDE))
    first, third = (lax.slice_in_dim(even, i, i + out, axis=axis) for i in range(2))
    return first, lax.slice_in_dim(odd, 0, out, axis=axis), third

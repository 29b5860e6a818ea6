"""Kernels for GPUs: a 3x3 convolution of few channels and the batch normalisation behind it.

cuDNN takes several times as long for few channels as their maps take to read and write, and of the
small maps of CIFAR's networks what lies between kernels takes as long as they do. Here one kernel
convolves and sums for the statistics, one normalises; in the gradient one sums, one takes it
through the normalisation, and one through the convolution, to the input and to the kernel at once,
from the same shifted tiles:

    dx(p) = sum over taps of dz(p - tap) k(tap)',   dk(tap) = sum over p of x(p)' dz(p - tap)

Maps are taken as one row of numbers, images one after the other. Each program of a grid has
some positions in a row, and leaves its share of a sum, which the kernel behind it adds up: no sum
depends on the order in which programs run.

Written in Pallas, for its Triton backend; elsewhere it is interpreted, for tests.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array


class Tile(NamedTuple):
    """What a program does, of maps of some channels by what was fastest; docs/decisions.md.

    Attributes:
      rows: positions at a time, a power of two.
      warps: of 32 threads, that it has.
      times: so many one after the other.
    """

    rows: int
    warps: int
    times: int = 1


CONVOLVE = {16: Tile(512, 4), 32: Tile(128, 4), 64: Tile(64, 4)}
GRADIENTS = {16: Tile(64, 2, 4), 32: Tile(128, 2), 64: Tile(128, 8)}
SUM = {16: Tile(512, 4), 32: Tile(256, 4), 64: Tile(128, 4)}
APPLY = {16: Tile(512, 4), 32: Tile(128, 4), 64: Tile(64, 8)}
MOST = 512  # programs that leave shares of a sum, where that is possible
ADDED_UP = 8192  # elements of shares that a program holds at a time


class Norm(NamedTuple):
    """Of a normalisation what is no array.

    Attributes:
      epsilon: added to the variance.
      activate: ReLU behind it.
      dtype: of maps.
      wide: of statistics and sums.
      keep: what a running statistic keeps of itself.
      correction: that a variance is multiplied by before it is averaged.
    """

    epsilon: float
    activate: bool
    dtype: Any
    wide: Any
    keep: float
    correction: float


class Shares(NamedTuple):
    """Of sums over a map, what each program found.

    Attributes:
      sums: of the differences from `about`, `[programs * c]`.
      squares: of their squares, the same.
      about: `[c]`, written anew, as what it was read from is to be overwritten.
    """

    sums: Array
    squares: Array
    about: Array


def convolve(x: Array, kernel: Array, about: Array, wide: Any) -> tuple[Array, Shares]:
    """The convolution, and sums over it for its mean and variance.

    Args:
      x: `[b, h, w, c]`.
      kernel: `[3, 3, c, c]`, which is rounded to the type of `x`.
      about: `[c]`, of the type `wide`, what is near the mean.
      wide: type that is summed in.
    """
    b, h, w, c = x.shape
    n = b * h * w
    tile, programs = _cut(n, CONVOLVE[c])
    z, *shares = _call(
        partial(_convolve, tile=tile, side=(h, w)),
        (_shape(n * c, x.dtype), *[_shape(programs * c, wide)] * 2, _shape(c, wide)),
        programs,
        tile.warps,
        *(x.reshape(-1), kernel.reshape(-1), about),
    )
    return z.reshape(x.shape), Shares(*shares)


def _convolve(x, kernel, about, z, sums, squares, again, *, tile, side):  # type: ignore[no-untyped-def]
    program, c, wide = pl.program_id(0), about.shape[0], about.dtype
    centre = about[...]

    def some(time: Any, found: Any) -> Any:
        base = (program * tile.times + time) * tile.rows
        output = jnp.zeros((tile.rows, c), wide)
        for row in range(3):
            for column in range(3):
                shifted = _shifted(x, base, c, row, column, tile.rows, side)
                output += _dot(shifted, _tap(kernel, c, row, column, x.dtype), wide)
        output = output.astype(z.dtype)
        z[_at(base, tile.rows, c)] = output
        return _with_moments(found, output.astype(wide) - centre)

    total, square = _times(tile.times, some, (jnp.zeros((c,), wide),) * 2)
    _put_row(sums, program, total)
    _put_row(squares, program, square)
    _put(again, centre, program == 0)


def sums(z: Array, about: Array, wide: Any) -> Shares:
    """As `convolve`'s, of a map that is there."""
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    tile, programs = _cut(n, SUM[c])
    shares = _call(
        partial(_sums, tile=tile),
        (*[_shape(programs * c, wide)] * 2, _shape(c, wide)),
        programs,
        tile.warps,
        *(z.reshape(-1), about),
    )
    return Shares(*shares)


def _sums(z, about, sums, squares, again, *, tile):  # type: ignore[no-untyped-def]
    program, c, wide = pl.program_id(0), about.shape[0], about.dtype
    centre = about[...]

    def some(time: Any, found: Any) -> Any:
        here = _at((program * tile.times + time) * tile.rows, tile.rows, c)
        return _with_moments(found, z[here].astype(wide) - centre)

    total, square = _times(tile.times, some, (jnp.zeros((c,), wide),) * 2)
    _put_row(sums, program, total)
    _put_row(squares, program, square)
    _put(again, centre, program == 0)


def normalize(
    norm: Norm,
    z: Array,
    shares: Shares,
    running: tuple[Array, Array],
    scale: Array,
    bias: Array,
    residual: Array | None,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """The activations.

    Args:
      norm: the rest.
      z: the convolution's output, `[b, h, w, c]`.
      shares: from it.
      running: mean and variance, `[c]`.
      scale: `[c]`.
      bias: the same.
      residual: of the shape of `z`.

    Returns:
      The activations, `[2, c]` mean and variance, and the running ones after them.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    rows, warps = math.gcd(n, APPLY[c].rows), APPLY[c].warps
    flat = [] if residual is None else [residual.reshape(-1)]
    y, moments, *moved = _call(
        partial(_normalize, norm=norm, n=n, rows=rows),
        (_shape(n * c, norm.dtype), *(_shape(size, norm.wide) for size in (2 * c, c, c))),
        n // rows,
        warps,
        *(z.reshape(-1), *shares, *running, scale, bias, *flat),
        overwrites={4: 2, 5: 3},  # the running statistics, which a loop would copy
    )
    return y.reshape(z.shape), moments.reshape(2, c), (moved[0], moved[1])


def _normalize(*refs, norm, n, rows):  # type: ignore[no-untyped-def]
    z, sums, squares, about, old_mean, old_var, scale, bias, *residual = refs[:-4]
    y, moments, mean, var = refs[-4:]
    program, c = pl.program_id(0), scale.shape[0]
    here = _at(program * rows, rows, c)
    centre = _added_up(sums, c) / n
    spread = jnp.maximum(_added_up(squares, c) / n - centre * centre, 0)
    middle = centre + about[...]
    _put_pair(moments, middle, spread, program == 0)
    found = middle, spread * norm.correction
    for old, now, new in zip((old_mean, old_var), found, (mean, var), strict=True):
        _put(new, norm.keep * old[...] + (1 - norm.keep) * now, program == 0)
    factor = lax.rsqrt(spread + norm.epsilon) * scale[...]
    found = (z[here].astype(norm.wide) - middle) * factor + bias[...]
    for one in residual:
        found += one[here].astype(norm.wide)
    y[here] = (_relu(found) if norm.activate else found).astype(y.dtype)


def sum_gradients(
    norm: Norm,
    dy: Array,
    z: Array,
    moments: Array,
    scale: Array,
    bias: Array,
    signs: Array | None,
) -> tuple[Array, Array, Array]:
    """What arrives at the normalisation, and sums of it and of its products with z - mean.

    Args:
      norm: the rest.
      dy: the gradient of the activations, `[b, h, w, c]`.
      z: the convolution's output.
      moments: `[2, c]`, its mean and variance.
      scale: `[c]`.
      bias: the same.
      signs: the activations where a residual was added, else they are computed again.

    Returns:
      The gradient past ReLU, which without `signs` is `dy` itself, and `[programs, c]` sums.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    tile, programs = _cut(n, SUM[c])
    flat = [] if signs is None else [signs.reshape(-1)]
    masked = [] if signs is None else [_shape(n * c, dy.dtype)]
    *passed, sums, products = _call(
        partial(_sum_gradients, norm=norm, tile=tile, masked=len(masked)),
        (*masked, *[_shape(programs * c, norm.wide)] * 2),
        programs,
        tile.warps,
        *(dy.reshape(-1), z.reshape(-1), moments.reshape(-1), scale, bias, *flat),
    )
    return passed[0].reshape(z.shape) if passed else dy, sums, products


def _sum_gradients(*refs, norm, tile, masked):  # type: ignore[no-untyped-def]
    dy, z, moments, scale, bias, *more, sums, products = refs
    program, c = pl.program_id(0), scale.shape[0]
    (middle, spread), shift = _pair(moments, c), bias[...]
    factor = lax.rsqrt(spread + norm.epsilon) * scale[...]

    def some(time: Any, found: Any) -> Any:
        here = _at((program * tile.times + time) * tile.rows, tile.rows, c)
        u = z[here].astype(norm.wide) - middle
        dz = dy[here].astype(norm.wide)
        if masked:
            signs, passed = more
            dz = jnp.where(signs[here] > 0, dz, 0)
            passed[here] = dz.astype(passed.dtype)
        elif norm.activate:
            dz = jnp.where(u * factor + shift > 0, dz, 0)
        return found[0] + dz.sum(0), found[1] + (dz * u).sum(0)

    total, product = _times(tile.times, some, (jnp.zeros(middle.shape, norm.wide),) * 2)
    _put_row(sums, program, total)
    _put_row(products, program, product)


def through_norm(
    norm: Norm,
    passed: Array,
    masked: bool,
    z: Array,
    sums: Array,
    products: Array,
    moments: Array,
    scale: Array,
    bias: Array,
    dmoments: Array,
) -> tuple[Array, Array]:
    """The gradients to the convolution's output, and `[2, c]` to scale and bias.

    Args:
      norm: the rest.
      passed: from `sum_gradients`, as are `sums` and `products`.
      masked: whether it is past ReLU.
      z: the convolution's output.
      sums: see above.
      products: the same.
      moments: `[2, c]`, mean and variance of `z`.
      scale: `[c]`.
      bias: the same.
      dmoments: `[2, c]`, the gradients of the moments themselves.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    rows, warps = math.gcd(n, APPLY[c].rows), APPLY[c].warps
    dz, slopes = _call(
        partial(_through_norm, norm=norm, n=n, rows=rows, masked=masked),
        (_shape(n * c, z.dtype), _shape(2 * c, norm.wide)),
        n // rows,
        warps,
        *(passed.reshape(-1), z.reshape(-1), sums, products),
        *(moments.reshape(-1), scale, bias, dmoments.reshape(-1)),
    )
    return dz.reshape(z.shape), slopes.reshape(2, c)


def _through_norm(*refs, norm, n, rows, masked):  # type: ignore[no-untyped-def]
    passed, z, sums, products, moments, scale, bias, dmoments, dz, slopes = refs
    program, c = pl.program_id(0), scale.shape[0]
    here = _at(program * rows, rows, c)
    total, product = _added_up(sums, c), _added_up(products, c)
    (middle, spread), (dmean, dvar) = _pair(moments, c), _pair(dmoments, c)
    inverse = lax.rsqrt(spread + norm.epsilon)
    factor = inverse * scale[...]
    _put_pair(slopes, product * inverse, total, program == 0)
    slope = (2 * dvar - factor * inverse * inverse * product) / n
    level = (dmean - factor * total) / n
    u = z[here].astype(norm.wide) - middle
    found = passed[here].astype(norm.wide)
    if norm.activate and not masked:
        found = jnp.where(u * factor + bias[...] > 0, found, 0)
    dz[here] = (found * factor + (u * slope + level)).astype(dz.dtype)


def gradients(x: Array, kernel: Array, dz: Array, wide: Any) -> tuple[Array, Array]:
    """The convolution's, to its input and to its kernel."""
    b, h, w, c = x.shape
    n = b * h * w
    tile, programs = _cut(n, GRADIENTS[c])
    dx, shares = _call(
        partial(_gradients, tile=tile, side=(h, w), c=c, wide=wide),
        (_shape(n * c, x.dtype), _shape(programs * kernel.size, wide)),
        programs,
        tile.warps,
        *(x.reshape(-1), kernel.reshape(-1), dz.reshape(-1)),
    )
    dkernel = shares.reshape(programs, *kernel.shape).sum(0)
    return dx.reshape(x.shape), dkernel.astype(kernel.dtype)


def _gradients(x, kernel, dz, dx, shares, *, tile, side, c, wide):  # type: ignore[no-untyped-def]
    program = pl.program_id(0)

    def some(time: Any, found: Any) -> Any:
        base = (program * tile.times + time) * tile.rows
        here = _at(base, tile.rows, c)
        across, total = x[here].T, jnp.zeros((tile.rows, c), wide)
        added = []
        for row in range(3):
            for column in range(3):
                shifted = _shifted(dz, base, c, row, column, tile.rows, side)
                total += _dot(shifted, _tap(kernel, c, 2 - row, 2 - column, dz.dtype).T, wide)
                added.append(_dot(across, shifted, wide))
        dx[here] = total.astype(dx.dtype)
        return tuple(a + b for a, b in zip(found, added, strict=True))

    found = _times(tile.times, some, (jnp.zeros((c, c), wide),) * 9)
    # What was found moved by so much belongs to the tap on the other side of the middle.
    for tap, share in enumerate(reversed(found)):
        shares[_at((program * 9 + tap) * c, c, c)] = share


# Parts ------------------------------------------------------------------------------------------


def _call(
    kernel: Callable[..., None],
    shapes: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    warps: int,
    *operands: Array,
    overwrites: dict[int, int] | None = None,
) -> Sequence[Array]:
    """What a kernel makes.

    Args:
      kernel: of references to the operands and to what it makes.
      shapes: of what it makes.
      programs: that share the work.
      warps: of each.
      operands: of one dimension.
      overwrites: which operands' memory may be that of what is made.
    """

    def call(interpret: bool, *operands: Array) -> Sequence[Array]:
        parameters = None if interpret else triton.CompilerParams(num_warps=warps, num_stages=2)
        return pl.pallas_call(
            kernel,
            tuple(shapes),
            grid=(programs,),
            input_output_aliases=overwrites or {},
            compiler_params=parameters,
            interpret=interpret,
        )(*operands)

    return lax.platform_dependent(*operands, cuda=partial(call, False), default=partial(call, True))


def _shape(size: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), dtype)


def _cut(n: int, tile: Tile) -> tuple[Tile, int]:
    """The tile, smaller where `n` positions do not divide, of more where they are many.

    Returns:
      It, and the number of programs.
    """
    rows = math.gcd(tile.rows, n)
    times = math.gcd(tile.times, n // rows)
    while n // rows // times > MOST and n // rows % (2 * times) == 0:
        times *= 2
    return tile._replace(rows=rows, times=times), n // rows // times


def _times(times: int, function: Callable[[Any, Any], Any], start: Any) -> Any:
    if times == 1:
        return function(0, start)
    return lax.fori_loop(0, times, function, start)


def _iota(size: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def _shifted(map_, base, c, row, column, rows, side):  # type: ignore[no-untyped-def]
    """A map `[n * c]` where a tap sees it from some positions, `[rows, c]`.

    Zero beyond the edges of an image.
    """
    h, w = side
    p = base + _iota(rows)
    down = lax.rem(lax.div(p, jnp.int32(w)), jnp.int32(h)) + (row - 1)
    along = lax.rem(p, jnp.int32(w)) + (column - 1)
    there = (down >= 0) & (down < h) & (along >= 0) & (along < w)
    at = _at(base + ((row - 1) * w + column - 1), rows, c)
    return triton.load(map_.at[at], mask=jnp.broadcast_to(there[:, None], (rows, c)), other=0)


def _tap(kernel, c, row, column, dtype):  # type: ignore[no-untyped-def]
    """Of a kernel `[9 * c * c]` one tap, `[c, c]`."""
    return kernel[_at((row * 3 + column) * c, c, c)].astype(dtype)


def _with_moments(found, u):  # type: ignore[no-untyped-def]
    return found[0] + u.sum(0), found[1] + (u * u).sum(0)


def _dot(a: Array, b: Array, wide: Any) -> Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=wide)


def _relu(x: Array) -> Array:
    return jnp.where(x <= 0, 0, x)


def _at(start, rows, c):  # type: ignore[no-untyped-def]
    """Where some positions of a map `[n * c]` lie, `[rows, c]`."""
    return (start + _iota(rows))[:, None] * c + _iota(c)[None]


def _added_up(shares, c):  # type: ignore[no-untyped-def]
    """The sum of what programs found, `[programs * c]`."""
    programs = shares.shape[0] // c
    some = min(1 << (programs - 1).bit_length(), ADDED_UP // c)

    def more(turn: Any, found: Array) -> Array:
        there = jnp.broadcast_to((turn * some + _iota(some) < programs)[:, None], (some, c))
        at = _at(turn * some, some, c)
        return found + triton.load(shares.at[at], mask=there, other=0).sum(0)

    return _times(-(-programs // some), more, jnp.zeros((c,), shares.dtype))


def _put(ref, value, condition):  # type: ignore[no-untyped-def]
    """Writes it where the condition holds: one program for all."""
    there = jnp.broadcast_to(condition, value.shape)
    triton.store(ref.at[_iota(value.shape[0])], value, mask=there)


def _pair(ref, c):  # type: ignore[no-untyped-def]
    """Both of `[2 * c]`."""
    return ref[_iota(c)], ref[c + _iota(c)]


def _put_pair(ref, first, second, condition):  # type: ignore[no-untyped-def]
    """As `_put`, `[2 * c]`."""
    at, there = _iota(first.shape[0]), jnp.broadcast_to(condition, first.shape)
    triton.store(ref.at[at], first, mask=there)
    triton.store(ref.at[first.shape[0] + at], second, mask=there)


def _put_row(ref, row, value):  # type: ignore[no-untyped-def]
    ref[row * value.shape[0] + _iota(value.shape[0])] = value

"""What kernels for GPUs are made of: calls, tiles, reads and writes of rows of a map."""

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

MOST = 512  # programs that leave shares of a sum, where that is possible
ADDED_UP = 8192  # elements of shares that a program holds at a time


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


# What each kernel does, by the number of channels.
CONVOLVE = {16: Tile(512, 4), 32: Tile(128, 4), 64: Tile(64, 4)}
GRADIENTS = {16: Tile(64, 2, 4), 32: Tile(128, 2), 64: Tile(128, 8)}
SUM = {16: Tile(512, 4), 32: Tile(256, 4), 64: Tile(128, 4)}
APPLY = {16: Tile(512, 4), 32: Tile(128, 4), 64: Tile(64, 8)}


def call(
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


def shape(size: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Of `size` numbers."""
    return jax.ShapeDtypeStruct((size,), dtype)


def cut(n: int, tile: Tile) -> tuple[Tile, int]:
    """The tile, smaller where `n` positions do not divide, of more where they are many.

    Returns:
      It, and the number of programs.
    """
    rows = math.gcd(tile.rows, n)
    times = math.gcd(tile.times, n // rows)
    while n // rows // times > MOST and n // rows % (2 * times) == 0:
        times *= 2
    return tile._replace(rows=rows, times=times), n // rows // times


def repeat(times: int, function: Callable[[Any, Any], Any], start: Any) -> Any:
    """What the function of turn and what was found before finds in so many turns."""
    if times == 1:
        return function(0, start)
    return lax.fori_loop(0, times, function, start)


def iota(size: int) -> Array:
    """0 to size - 1."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def shifted(map_, base, c, row, column, rows, side):  # type: ignore[no-untyped-def]
    """A map `[n * c]` where a tap sees it from some positions, `[rows, c]`.

    Zero beyond the edges of an image.
    """
    h, w = side
    p = base + iota(rows)
    down = lax.rem(lax.div(p, jnp.int32(w)), jnp.int32(h)) + (row - 1)
    along = lax.rem(p, jnp.int32(w)) + (column - 1)
    there = (down >= 0) & (down < h) & (along >= 0) & (along < w)
    at = places(base + ((row - 1) * w + column - 1), rows, c)
    return triton.load(map_.at[at], mask=jnp.broadcast_to(there[:, None], (rows, c)), other=0)


def tap(kernel, c, row, column, dtype):  # type: ignore[no-untyped-def]
    """Of a kernel `[9 * c * c]` one tap, `[c, c]`."""
    return kernel[places((row * 3 + column) * c, c, c)].astype(dtype)


def with_moments(found, u):  # type: ignore[no-untyped-def]
    """Two sums `[c]`, with those of `[rows, c]` and of its squares."""
    return found[0] + u.sum(0), found[1] + (u * u).sum(0)


def dot(a: Array, b: Array, wide: Any) -> Array:
    """The product of two matrices, summed in the type `wide`."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=wide)


def places(start, rows, c):  # type: ignore[no-untyped-def]
    """Where some positions of a map `[n * c]` lie, `[rows, c]`."""
    return (start + iota(rows))[:, None] * c + iota(c)[None]


def added_up(shares, c):  # type: ignore[no-untyped-def]
    """The sum of what programs found, `[programs * c]`."""
    programs = shares.shape[0] // c
    some = min(1 << (programs - 1).bit_length(), ADDED_UP // c)

    def more(turn: Any, found: Array) -> Array:
        there = jnp.broadcast_to((turn * some + iota(some) < programs)[:, None], (some, c))
        at = places(turn * some, some, c)
        return found + triton.load(shares.at[at], mask=there, other=0).sum(0)

    return repeat(-(-programs // some), more, jnp.zeros((c,), shares.dtype))


def put(ref, value, condition):  # type: ignore[no-untyped-def]
    """Writes it where the condition holds: one program for all."""
    there = jnp.broadcast_to(condition, value.shape)
    triton.store(ref.at[iota(value.shape[0])], value, mask=there)


def pair(ref, c):  # type: ignore[no-untyped-def]
    """Both of `[2 * c]`."""
    return ref[iota(c)], ref[c + iota(c)]


def put_pair(ref, first, second, condition):  # type: ignore[no-untyped-def]
    """As `put`, `[2 * c]`."""
    at, there = iota(first.shape[0]), jnp.broadcast_to(condition, first.shape)
    triton.store(ref.at[at], first, mask=there)
    triton.store(ref.at[first.shape[0] + at], second, mask=there)


def put_row(ref, row, value):  # type: ignore[no-untyped-def]
    """Writes a row `[c]` of `[rows * c]`."""
    ref[row * value.shape[0] + iota(value.shape[0])] = value

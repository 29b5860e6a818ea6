"""Building blocks of GPU kernels: calls, tiles, reads and writes of rows of a map."""

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

MOST = 512  # programs that write partial sums, if possible
ADDED_UP = 8192  # elements of partial sums that a program loads at a time


class Tile(NamedTuple):
    """The work of one program, as it was fastest for a number of channels; docs/decisions.md.

    Attributes:
      rows: positions per iteration, a power of two.
      warps: number of warps of 32 threads.
      times: number of iterations.
    """

    rows: int
    warps: int
    times: int = 1


# The tile of each kernel, by the number of channels.
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
    """Calls a kernel and returns its outputs.

    Args:
      kernel: a function of references to the operands and to the outputs.
      shapes: of the outputs.
      programs: number of programs in the grid.
      warps: per program.
      operands: one-dimensional arrays.
      overwrites: outputs that reuse an operand's memory, by operand.
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
    """A one-dimensional shape of `size` elements."""
    return jax.ShapeDtypeStruct((size,), dtype)


def cut(n: int, tile: Tile) -> tuple[Tile, int]:
    """The tile, with fewer rows if they do not divide `n` positions, or more iterations for many.

    Returns:
      The tile, and the number of programs.
    """
    rows = math.gcd(tile.rows, n)
    times = math.gcd(tile.times, n // rows)
    while n // rows // times > MOST and n // rows % (2 * times) == 0:
        times *= 2
    return tile._replace(rows=rows, times=times), n // rows // times


def repeat(times: int, function: Callable[[Any, Any], Any], start: Any) -> Any:
    """Applies `function(iteration, carry)` so many times."""
    if times == 1:
        return function(0, start)
    return lax.fori_loop(0, times, function, start)


def iota(size: int) -> Array:
    """0 to size - 1."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def shifted(map_, base, c, row, column, rows, side):  # type: ignore[no-untyped-def]
    """The values of a map `[n * c]` that a tap multiplies at some positions, `[rows, c]`.

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
    """One tap `[c, c]` of a kernel `[9 * c * c]`."""
    return kernel[places((row * 3 + column) * c, c, c)].astype(dtype)


def with_moments(found, u):  # type: ignore[no-untyped-def]
    """Adds the sums of `[rows, c]` and of its squares to two sums `[c]`."""
    return found[0] + u.sum(0), found[1] + (u * u).sum(0)


def dot(a: Array, b: Array, wide: Any) -> Array:
    """The product of two matrices, summed in the type `wide`."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=wide)


def places(start, rows, c):  # type: ignore[no-untyped-def]
    """Indices `[rows, c]` of some positions of a map `[n * c]`."""
    return (start + iota(rows))[:, None] * c + iota(c)[None]


def added_up(shares, c):  # type: ignore[no-untyped-def]
    """The total of the programs' partial sums `[programs * c]`."""
    programs = shares.shape[0] // c
    some = min(1 << (programs - 1).bit_length(), ADDED_UP // c)

    def more(turn: Any, found: Array) -> Array:
        there = jnp.broadcast_to((turn * some + iota(some) < programs)[:, None], (some, c))
        at = places(turn * some, some, c)
        return found + triton.load(shares.at[at], mask=there, other=0).sum(0)

    return repeat(-(-programs // some), more, jnp.zeros((c,), shares.dtype))


def put(ref, value, condition):  # type: ignore[no-untyped-def]
    """Writes the value if the condition is true: one program writes for all."""
    there = jnp.broadcast_to(condition, value.shape)
    triton.store(ref.at[iota(value.shape[0])], value, mask=there)


def pair(ref, c):  # type: ignore[no-untyped-def]
    """Reads both rows of `[2 * c]`."""
    return ref[iota(c)], ref[c + iota(c)]


def put_pair(ref, first, second, condition):  # type: ignore[no-untyped-def]
    """Writes two rows to `[2 * c]`, see `put`."""
    at, there = iota(first.shape[0]), jnp.broadcast_to(condition, first.shape)
    triton.store(ref.at[at], first, mask=there)
    triton.store(ref.at[first.shape[0] + at], second, mask=there)


def put_row(ref, row, value):  # type: ignore[no-untyped-def]
    """Writes a row `[c]` of `[rows * c]`."""
    ref[row * value.shape[0] + iota(value.shape[0])] = value

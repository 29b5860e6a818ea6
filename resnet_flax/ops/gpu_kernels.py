"""GPU kernels: a 3x3 convolution of few channels and batch normalisation of its output.

For few channels cuDNN takes several times as long as reading and writing the maps, and for the
small maps of CIFAR networks the gaps between kernels take as long as the kernels. Here one kernel
convolves and sums for the statistics, and one normalises; their gradients are in
`gpu_kernel_gradients`.

Maps are flattened, with images one after the other. Each program of a grid processes consecutive
positions and writes a partial sum; the next kernel adds these up, so no sum depends on the order in
which programs run.

Written in Pallas for its Triton backend; on other devices it is interpreted, for tests.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from resnet_flax.ops import gpu_kernel_parts as parts
from resnet_flax.ops.batch_norm import relu
from resnet_flax.ops.spec import BatchNormSpec


class Shares(NamedTuple):
    """Each program's partial sums over a map.

    Attributes:
      sums: of the differences from `shift`, `[programs * c]`.
      squares: of their squares, the same.
      shift: `[c]`, a copy, as its source will be overwritten.
    """

    sums: Array
    squares: Array
    shift: Array


def convolve(x: Array, kernel: Array, shift: Array, wide: Any) -> tuple[Array, Shares]:
    """The convolution, and sums over its output for the mean and variance.

    Args:
      x: `[b, h, w, c]`.
      kernel: `[3, 3, c, c]`, which is cast to the type of `x`.
      shift: `[c]` of the type `wide`, an estimate of the mean.
      wide: type of the sums.
    """
    b, h, w, c = x.shape
    n = b * h * w
    tile, programs = parts.cut(n, parts.CONVOLVE[c])
    z, *shares = parts.call(
        partial(_convolve, tile=tile, side=(h, w)),
        (parts.shape(n * c, x.dtype), *[parts.shape(programs * c, wide)] * 2, parts.shape(c, wide)),
        programs,
        tile.warps,
        *(x.reshape(-1), kernel.reshape(-1), shift),
    )
    return z.reshape(x.shape), Shares(*shares)


def _convolve(x, kernel, shift, z, sums, squares, again, *, tile, side):  # type: ignore[no-untyped-def]
    program, c, wide = pl.program_id(0), shift.shape[0], shift.dtype
    center = shift[...]

    def some(time: Any, found: Any) -> Any:
        base = (program * tile.times + time) * tile.rows
        output = jnp.zeros((tile.rows, c), wide)
        for row in range(3):
            for column in range(3):
                shifted = parts.shifted(x, base, c, row, column, tile.rows, side)
                output += parts.dot(shifted, parts.tap(kernel, c, row, column, x.dtype), wide)
        output = output.astype(z.dtype)
        z[parts.places(base, tile.rows, c)] = output
        return parts.with_moments(found, output.astype(wide) - center)

    total, square = parts.repeat(tile.times, some, (jnp.zeros((c,), wide),) * 2)
    parts.put_row(sums, program, total)
    parts.put_row(squares, program, square)
    parts.put(again, center, program == 0)


def sums(z: Array, shift: Array, wide: Any) -> Shares:
    """The sums of `convolve`, for an existing map."""
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    tile, programs = parts.cut(n, parts.SUM[c])
    shares = parts.call(
        partial(_sums, tile=tile),
        (*[parts.shape(programs * c, wide)] * 2, parts.shape(c, wide)),
        programs,
        tile.warps,
        *(z.reshape(-1), shift),
    )
    return Shares(*shares)


def _sums(z, shift, sums, squares, again, *, tile):  # type: ignore[no-untyped-def]
    program, c, wide = pl.program_id(0), shift.shape[0], shift.dtype
    center = shift[...]

    def some(time: Any, found: Any) -> Any:
        here = parts.places((program * tile.times + time) * tile.rows, tile.rows, c)
        return parts.with_moments(found, z[here].astype(wide) - center)

    total, square = parts.repeat(tile.times, some, (jnp.zeros((c,), wide),) * 2)
    parts.put_row(sums, program, total)
    parts.put_row(squares, program, square)
    parts.put(again, center, program == 0)


def normalize(
    spec: BatchNormSpec,
    z: Array,
    shares: Shares,
    running: tuple[Array, Array],
    scale: Array,
    bias: Array,
    residual: Array | None,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Normalises, adds the residual and applies the ReLU.

    Args:
      spec: the rest.
      z: the convolution's output, `[b, h, w, c]`.
      shares: partial sums over `z`.
      running: running mean and variance, `[c]`.
      scale: `[c]`.
      bias: the same.
      residual: with the shape of `z`.

    Returns:
      The activations, `[2, c]` mean and variance, and the updated running ones.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    rows, warps = math.gcd(n, parts.APPLY[c].rows), parts.APPLY[c].warps
    flat = [] if residual is None else [residual.reshape(-1)]
    y, moments, *moved = parts.call(
        partial(_normalize, spec=spec, n=n, rows=rows),
        (
            parts.shape(n * c, spec.dtype),
            *(parts.shape(size, spec.param_dtype) for size in (2 * c, c, c)),
        ),
        n // rows,
        warps,
        *(z.reshape(-1), *shares, *running, scale, bias, *flat),
        overwrites={4: 2, 5: 3},  # the running statistics, which a loop would otherwise copy
    )
    return y.reshape(z.shape), moments.reshape(2, c), (moved[0], moved[1])


def _normalize(*refs, spec, n, rows):  # type: ignore[no-untyped-def]
    z, sums, squares, shift, old_mean, old_var, scale, bias, *residual = refs[:-4]
    y, moments, mean, var = refs[-4:]
    program, c = pl.program_id(0), scale.shape[0]
    here = parts.places(program * rows, rows, c)
    center = parts.added_up(sums, c) / n
    spread = relu(parts.added_up(squares, c) / n - center * center)  # NaN propagates
    middle = center + shift[...]
    parts.put_pair(moments, middle, spread, program == 0)
    found = middle, spread * spec.bessel_correction
    for old, now, new in zip((old_mean, old_var), found, (mean, var), strict=True):
        parts.put(new, spec.momentum * old[...] + (1 - spec.momentum) * now, program == 0)
    factor = lax.rsqrt(spread + spec.epsilon) * scale[...]
    found = (z[here].astype(spec.param_dtype) - middle) * factor + bias[...]
    for one in residual:
        found += one[here].astype(spec.param_dtype)
    y[here] = (relu(found) if spec.activate else found).astype(y.dtype)

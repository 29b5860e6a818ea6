"""GPU kernels: the gradients of a 3x3 convolution and the batch normalisation of its output.

`gpu_kernels` describes the forward pass, and how maps are tiled and sums are added up. One kernel
sums, one backpropagates through the normalisation, and one through the convolution, to input and
kernel together, from the same shifted tiles:

    dx(p) = sum over taps of dz(p - tap) k(tap)',   dk(tap) = sum over p of x(p)' dz(p - tap)
"""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from resnet_flax.ops import gpu_kernel_parts as parts
from resnet_flax.ops.spec import BatchNormSpec


def sum_gradients(
    spec: BatchNormSpec,
    dy: Array,
    z: Array,
    moments: Array,
    scale: Array,
    bias: Array,
    signs: Array | None,
) -> tuple[Array, Array, Array]:
    """The gradient to the normalisation's output, and sums of it and of its product with z - mean.

    Args:
      spec: static parameters.
      dy: the gradient of the activations, `[b, h, w, c]`.
      z: the convolution's output.
      moments: `[2, c]`, mean and variance of `z`.
      scale: `[c]`.
      bias: the same.
      signs: the activations if a residual was added; otherwise None, and signs are recomputed.

    Returns:
      The gradient through the ReLU, which is `dy` itself without `signs`, and `[programs, c]` sums.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    tile, programs = parts.cut(n, parts.SUM[c])
    flat = [] if signs is None else [signs.reshape(-1)]
    masked = [] if signs is None else [parts.shape(n * c, dy.dtype)]
    *passed, sums, products = parts.call(
        partial(_sum_gradients, spec=spec, tile=tile, masked=len(masked)),
        (*masked, *[parts.shape(programs * c, spec.param_dtype)] * 2),
        programs,
        tile.warps,
        *(dy.reshape(-1), z.reshape(-1), moments.reshape(-1), scale, bias, *flat),
    )
    return passed[0].reshape(z.shape) if passed else dy, sums, products


def _sum_gradients(*refs, spec, tile, masked):  # type: ignore[no-untyped-def]
    dy, z, moments, scale, bias, *more, sums, products = refs
    program, c = pl.program_id(0), scale.shape[0]
    (middle, spread), shift = parts.pair(moments, c), bias[...]
    factor = lax.rsqrt(spread + spec.epsilon) * scale[...]

    def some(time: Any, found: Any) -> Any:
        here = parts.places((program * tile.times + time) * tile.rows, tile.rows, c)
        u = z[here].astype(spec.param_dtype) - middle
        dz = dy[here].astype(spec.param_dtype)
        if masked:
            signs, passed = more
            dz = jnp.where(signs[here] > 0, dz, 0)
            passed[here] = dz.astype(passed.dtype)
        elif spec.activate:
            dz = jnp.where(u * factor + shift > 0, dz, 0)
        return found[0] + dz.sum(0), found[1] + (dz * u).sum(0)

    total, product = parts.repeat(
        tile.times, some, (jnp.zeros(middle.shape, spec.param_dtype),) * 2
    )
    parts.put_row(sums, program, total)
    parts.put_row(products, program, product)


def through_norm(
    spec: BatchNormSpec,
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
      spec: static parameters.
      passed: from `sum_gradients`, as are `sums` and `products`.
      masked: whether it already includes the ReLU's gradient.
      z: the convolution's output.
      sums: see `passed`.
      products: see `passed`.
      moments: `[2, c]`, mean and variance of `z`.
      scale: `[c]`.
      bias: the same.
      dmoments: `[2, c]`, the gradients of the moments themselves.
    """
    n, c = math.prod(z.shape[:-1]), z.shape[-1]
    rows, warps = math.gcd(n, parts.APPLY[c].rows), parts.APPLY[c].warps
    dz, slopes = parts.call(
        partial(_through_norm, spec=spec, n=n, rows=rows, masked=masked),
        (parts.shape(n * c, z.dtype), parts.shape(2 * c, spec.param_dtype)),
        n // rows,
        warps,
        *(passed.reshape(-1), z.reshape(-1), sums, products),
        *(moments.reshape(-1), scale, bias, dmoments.reshape(-1)),
    )
    return dz.reshape(z.shape), slopes.reshape(2, c)


def _through_norm(*refs, spec, n, rows, masked):  # type: ignore[no-untyped-def]
    passed, z, sums, products, moments, scale, bias, dmoments, dz, slopes = refs
    program, c = pl.program_id(0), scale.shape[0]
    here = parts.places(program * rows, rows, c)
    total, product = parts.added_up(sums, c), parts.added_up(products, c)
    (middle, spread), (dmean, dvar) = parts.pair(moments, c), parts.pair(dmoments, c)
    inverse = lax.rsqrt(spread + spec.epsilon)
    factor = inverse * scale[...]
    parts.put_pair(slopes, product * inverse, total, program == 0)
    slope = (2 * dvar - factor * inverse * inverse * product) / n
    level = (dmean - factor * total) / n
    u = z[here].astype(spec.param_dtype) - middle
    found = passed[here].astype(spec.param_dtype)
    if spec.activate and not masked:
        found = jnp.where(u * factor + bias[...] > 0, found, 0)
    dz[here] = (found * factor + (u * slope + level)).astype(dz.dtype)


def gradients(x: Array, kernel: Array, dz: Array, wide: Any) -> tuple[Array, Array]:
    """The convolution's gradients to its input and to its kernel."""
    b, h, w, c = x.shape
    n = b * h * w
    tile, programs = parts.cut(n, parts.GRADIENTS[c])
    dx, shares = parts.call(
        partial(_gradients, tile=tile, side=(h, w), c=c, wide=wide),
        (parts.shape(n * c, x.dtype), parts.shape(programs * kernel.size, wide)),
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
        here = parts.places(base, tile.rows, c)
        across, total = x[here].T, jnp.zeros((tile.rows, c), wide)
        added = []
        for row in range(3):
            for column in range(3):
                shifted = parts.shifted(dz, base, c, row, column, tile.rows, side)
                total += parts.dot(
                    shifted, parts.tap(kernel, c, 2 - row, 2 - column, dz.dtype).T, wide
                )
                added.append(parts.dot(across, shifted, wide))
        dx[here] = total.astype(dx.dtype)
        return tuple(a + b for a, b in zip(found, added, strict=True))

    found = parts.repeat(tile.times, some, (jnp.zeros((c, c), wide),) * 9)
    # The product for a shift is the gradient of the tap on the opposite side of the centre.
    for tap, share in enumerate(reversed(found)):
        shares[parts.places((program * 9 + tap) * c, c, c)] = share

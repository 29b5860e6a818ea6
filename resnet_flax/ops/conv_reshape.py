"""Convolutions as others of fewer positions with more channels, which GPUs compute faster."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.heuristics import columns_in_one
from resnet_flax.ops.spec import ConvSpec

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
CHANNELS_AT_A_TIME = 8  # of a GPU's tensor cores, in bfloat16


def space_to_depth(geometry: ConvSpec, x: Array, kernel: Array) -> Array:
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


def columns(geometry: ConvSpec, x: Array, kernel: Array) -> Array:
    """Several columns side by side as channels of one, for maps of few channels.

    With g columns to one, output column g a + q is channel q of a. It takes input column
    g a + q + t, t from minus the padding on, which is channel p of a + s where g s + p = q + t.
    """
    h, w, i, o = kernel.shape
    g = columns_in_one(x.shape[2], o)
    b, rows, width, _ = x.shape
    reach = -(-(w // 2) // g)  # columns of g that a kernel sees on either side
    wide = (2 * reach + 1) * g
    bands = [
        jnp.pad(kernel, ((0, 0), (first, wide - w - first), (0, 0), (0, 0)))
        for first in (reach * g + q - w // 2 for q in range(g))
    ]
    kernel = jnp.stack(bands, -2).reshape(h, 2 * reach + 1, g * i, g * o)
    pads = (geometry.padding[0], (reach, reach))
    y = _filled_conv(x.reshape(b, rows, width // g, g * i), kernel, pads)
    return y.reshape(b, y.shape[1], width, o)

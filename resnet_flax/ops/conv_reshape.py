"""Convolutions as other convolutions of reshaped maps.

`space_to_depth` and `width_to_channels` have fewer positions and more channels, which GPUs compute
faster; `polyphase_input_gradient` skips the zeros of a gradient that is dilated by the stride.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.ops.conv_xla import DIMENSIONS
from resnet_flax.ops.heuristics import folded_columns
from resnet_flax.ops.spec import ConvSpec, Pair, Shape

CHANNELS_AT_A_TIME = 8  # that a GPU's tensor cores process together, in bfloat16


def space_to_depth(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """Output u is the sum of x[s u + k] K[k]; with k = s a + b, of x[s (u + a) + b] K[s a + b]."""
    pads, over, squares = [(0, 0, 0)], [], []
    for n, k, s, (low, high) in zip(
        x.shape[1:3], kernel.shape[:2], spec.strides, spec.padding, strict=True
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
    high, wide = spec.strides
    area = kernel.shape[0] // high, kernel.shape[1] // wide
    kernel = kernel.reshape(area[0], high, area[1], wide, *kernel.shape[2:])
    return _filled_conv(
        x.reshape(b, squares[0], squares[2], high * wide * c),
        kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*area, high * wide * c, -1),
        "VALID",
    )


def _filled_conv(x: Array, kernel: Array, padding: Any) -> Array:
    """A convolution with channels padded to a multiple of what tensor cores process together."""
    more = -x.shape[-1] % CHANNELS_AT_A_TIME
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=DIMENSIONS)


def width_to_channels(spec: ConvSpec, x: Array, kernel: Array) -> Array:
    """Folds several columns into the channels of one, for maps of few channels.

    With g columns folded into one, output column g a + q is channel q of a. It takes input column
    g a + q + t, t from minus the padding on, which is channel p of a + s where g s + p = q + t.
    """
    h, w, i, o = kernel.shape
    g = folded_columns(x.shape[2], o)
    b, rows, width, _ = x.shape
    reach = -(-(w // 2) // g)  # folded columns that a kernel covers on either side
    wide = (2 * reach + 1) * g
    bands = [
        jnp.pad(kernel, ((0, 0), (first, wide - w - first), (0, 0), (0, 0)))
        for first in (reach * g + q - w // 2 for q in range(g))
    ]
    kernel = jnp.stack(bands, -2).reshape(h, 2 * reach + 1, g * i, g * o)
    pads = (spec.padding[0], (reach, reach))
    y = _filled_conv(x.reshape(b, rows, width // g, g * i), kernel, pads)
    return y.reshape(b, y.shape[1], width, o)


def polyphase_input_gradient(spec: ConvSpec, size: Shape, kernel: Array, dy: Array) -> Array:
    """The gradient to the input: one convolution for each residue of positions modulo the stride.

    Input row r = s u + a meets the taps k with k = a + low modulo s, at output u + const.
    """
    high, wide = spec.strides
    rows, columns = -(-size[1] // high), -(-size[2] // wide)
    phases = [
        [_phase(spec, (a, b), (rows, columns), kernel, dy) for b in range(wide)]
        for a in range(high)
    ]
    interleaved = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
    whole = interleaved.reshape(size[0], rows * high, columns * wide, size[3])
    return whole[:, : size[1], : size[2]]


def _phase(spec: ConvSpec, phase: Pair, number: Pair, kernel: Array, dy: Array) -> Array:
    (top, _), (left, _) = spec.padding
    high, wide = spec.strides
    first = ((phase[0] + top) % high, (phase[1] + left) % wide)
    part = kernel[first[0] :: high, first[1] :: wide][::-1, ::-1].swapaxes(2, 3)
    if 0 in part.shape:
        return jnp.zeros((dy.shape[0], *number, kernel.shape[2]), dy.dtype)
    pads = []
    for k, s, low, a, tap, n, n_out in zip(
        part.shape[:2], (high, wide), (top, left), phase, first, number, dy.shape[1:3], strict=True
    ):
        # The phase's last tap, the first one here, multiplies this output at the first position.
        output = (a + low - tap) // s - (k - 1)
        pads.append((-output, n - 1 + output + (k - 1) - (n_out - 1)))
    return lax.conv_general_dilated(dy, part, (1, 1), pads, dimension_numbers=DIMENSIONS)

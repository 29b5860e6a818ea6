"""A 1x1 convolution and batch normalisation of its output, without storing the map between them.

The output z = x w of a 1x1 convolution is linear in its input at each position, so sums over its
positions follow from sums over the input's:

    mean(z) = mean(x) w,    var(z) = diag(w' cov(x) w),    sum(g z) = diag(w' (x' g))

for a gradient g to the normalisation's output, where x' g is most of the kernel's gradient and
computed in any case. The gradient to z, which is a g + b z + c with a, b and c per channel, need
not be written either: the gradient to x is g (a w)' + x (w b w') + c w'. The last convolution of a
bottleneck block has the largest maps of a network; here the backward pass reads neither z nor its
gradient, and z is not saved. The cost is two products of c by c matrices, with the positions and
with w.

The covariance is E[x' x] - E[x]' E[x]. In float32 it loses digits if the mean of an output channel
is much larger than its standard deviation: at 30 times, 1e-5 of the variance.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.ops import dispatch
from resnet_flax.ops.batch_norm import (
    add_relu,
    barrier,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_tangent,
    where_positive,
)
from resnet_flax.ops.conv import conv2d
from resnet_flax.ops.linear import linear, or_zeros
from resnet_flax.ops.spec import BatchNormSpec, ConvSpec, Pair, output_size

EXACT = lax.Precision.HIGHEST


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def conv_batch_norm_1x1(
    spec: BatchNormSpec,
    strides: Pair,
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    shift: Array,
) -> tuple[Array, Array, Array]:
    """`batch_norm` of the output of a convolution whose kernel is of the type of `x`."""
    return _forward(spec, strides, x, kernel, scale, bias, residual, shift)[0]


class _Kept(NamedTuple):
    """What is saved for the gradient; fields that an implementation does not need are zeros.

    Attributes:
      mean: of the convolution's output, `[1, o]`.
      var: the same.
      z: the convolution's output; for 'unfused'.
      total: the sum over the input's positions, `[c]`; this and the next for 'fused'.
      spread: the covariance of the input's channels times the kernel, `[c, o]`.
    """

    mean: Array
    var: Array
    z: Array
    total: Array
    spread: Array


def _forward(spec, strides, x, kernel, scale, bias, residual, shift):  # type: ignore[no-untyped-def]
    functions = spec.implementations.map(
        lambda chosen: partial(
            {"unfused": _unfused, "fused": _fused}[chosen.conv_bn_1x1], spec, strides, chosen
        )
    )
    y, kept = dispatch.call(functions, x, kernel, scale, bias, residual, shift)
    like = None if residual is None else jnp.zeros((), residual.dtype)
    # The sign of the activations is that of the ReLU's input.
    signs = y if spec.activate else None
    return (y, kept.mean, kept.var), (x, kernel, scale, bias, kept, signs, like, shift)


@partial(conv_batch_norm_1x1.defjvp, symbolic_zeros=True)
def _derivative(spec, strides, operands, tangents):  # type: ignore[no-untyped-def]
    found, residuals = _forward(spec, strides, *operands)
    tangent, gradients = (partial(part, spec, strides) for part in (_tangent, _gradients))
    return found, linear(tangent, gradients, residuals, tangents, found)


def _tangent(spec, strides, residuals, tangents):  # type: ignore[no-untyped-def]
    (x, kernel, scale, bias, kept, signs, like, shift), (dx, dkernel, *rest) = residuals, tangents
    moving = or_zeros(dx, x), or_zeros(dkernel, kernel)
    z, dz = jax.jvp(lambda x, kernel: conv2d(x, kernel, strides), (x, kernel), moving)
    of_norm = z, scale, bias, kept.mean, kept.var, signs, like, shift
    return batch_norm_tangent(spec, of_norm, (dz, *rest))


def _gradients(spec, strides, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = spec.implementations.map(
        lambda chosen: partial(
            {"unfused": _unfused_gradients, "fused": _fused_gradients}[chosen.conv_bn_1x1],
            *(spec, strides, chosen),
        )
    )
    found = dispatch.call(functions, residuals[:-1], cotangents)
    return (*found, jnp.zeros_like(residuals[-1]))


# One after the other ----------------------------------------------------------------------------


def _unfused(spec, strides, chosen, x, kernel, scale, bias, residual, shift):  # type: ignore[no-untyped-def]
    z = conv2d(x, kernel, strides)
    y, mean, var = batch_norm_forward(spec, chosen, z, scale, bias, residual, shift)
    c, o = kernel.shape[2:]
    none = jnp.zeros((c,), spec.param_dtype), jnp.zeros((c, o), spec.param_dtype)
    return y, _Kept(mean, var, z, *none)


def _unfused_gradients(spec, strides, chosen, residuals, cotangents):  # type: ignore[no-untyped-def]
    x, kernel, scale, bias, kept, signs, like = residuals
    # Without a residual the sign of the ReLU's input is recomputed, as in `batch_norm_backward`.
    signs = None if like is None else signs
    of_norm = (kept.z, scale, bias, kept.mean, kept.var, signs, like)
    dz, *rest = batch_norm_backward(spec, chosen, of_norm, cotangents)
    # The output of this second forward pass is unused, and XLA removes it.
    _, gradient = jax.vjp(lambda x, kernel: conv2d(x, kernel, strides), x, kernel)
    return (*gradient(dz), *rest)


# As one -----------------------------------------------------------------------------------------


def _fused(spec, strides, chosen, x, kernel, scale, bias, residual, shift):  # type: ignore[no-untyped-def]
    del shift
    wide = spec.param_dtype
    shape = (len(x), *output_size(x.shape, kernel.shape, ConvSpec(strides)), kernel.shape[3])
    x, kernel = _positions(x, strides), kernel[0, 0]
    n, w = len(x), kernel.astype(wide)
    total = x.astype(wide).sum(0)
    center = total / n
    covariance = _summed(x, x, wide) / n - center[:, None] * center[None]
    # The covariance and the mean of the output in one product.
    moments = jnp.dot(jnp.vstack([covariance, center[None]]), w, precision=EXACT)
    spread, mean = moments[:-1], moments[-1]
    var = jnp.maximum((w * spread).sum(0), 0)
    factor = lax.rsqrt(var + spec.epsilon) * scale
    z = (x @ kernel).astype(spec.dtype)
    y = (z.astype(wide) * factor[None] + (bias - mean * factor)[None]).reshape(shape)
    y = barrier(chosen, add_relu(y, spec.activate, residual).astype(spec.dtype))
    return y, _Kept(mean[None], var[None], jnp.zeros(shape, x.dtype), total, spread)


def _fused_gradients(spec, strides, chosen, residuals, cotangents):  # type: ignore[no-untyped-def]
    """As `batch_norm_backward`, with the convolution's output u + mean = x w eliminated.

    With outer = x' dz: sum(dz u) = diag(w' outer) - mean sum(dz), and x' u = n cov(x) w.
    """
    whole, kernel, scale, _, kept, signs, like = residuals
    dy, dmean, dvar = cotangents
    x, back = _positions(whole, strides), partial(_positions_gradient, whole, strides)
    wide, n = spec.param_dtype, len(x)
    w, mean, var = kernel[0, 0].astype(wide), kept.mean[0], kept.var[0]
    inverse = lax.rsqrt(var + spec.epsilon)
    factor = inverse * scale
    dz = dy.astype(wide)
    if signs is not None:
        dz = where_positive(chosen, signs.astype(wide), dz)
    sums = dz.sum((0, 1, 2))
    dz = barrier(chosen, dz.astype(dy.dtype))
    dresidual = None if like is None else dz.astype(like.dtype)
    dz = dz.reshape(n, -1)
    outer = _summed(x, dz, wide)
    products = (w * outer).sum(0) - mean * sums
    slope = (2 * dvar[0] - factor * jnp.square(inverse) * products) / n
    level = (dmean[0] - factor * sums) / n
    dkernel = (
        outer * factor[None] + n * kept.spread * slope[None] + kept.total[:, None] * level[None]
    )
    # Each product is rounded to the type of the computation, like a convolution's output, and so
    # are the matrices. The term that is the same at all positions compensates for that, or errors
    # would add up in earlier layers: summed over positions the gradient is w dmean.
    through = ((w * slope[None]).astype(x.dtype) @ kernel[0, 0].T).astype(x.dtype)
    onward = (w * factor[None]).T.astype(x.dtype)
    matrices, weights = jnp.concatenate([onward, through]), jnp.concatenate([sums, kept.total])
    excess = (weights[:, None] * matrices.astype(wide)).sum(0)
    constant = (jnp.dot(w, dmean[0], precision=EXACT) - excess) / n
    dx = (dz @ onward).astype(wide) + ((x @ through).astype(wide) + constant[None])
    dx = barrier(chosen, dx.astype(x.dtype))
    return (
        *(back(dx), dkernel.reshape(kernel.shape).astype(kernel.dtype)),
        *(products * inverse, sums, dresidual),
    )


def _positions(x: Array, strides: Pair) -> Array:
    """The positions that the convolution reads, `[n, c]`."""
    return x[:, :: strides[0], :: strides[1]].reshape(-1, x.shape[-1])


def _positions_gradient(x: Array, strides: Pair, dx: Array) -> Array:
    """The gradient of `_positions`."""
    (whole,) = jax.linear_transpose(partial(_positions, strides=strides), x)(dx)
    return whole


def _summed(x: Array, y: Array, dtype: Any) -> Array:
    """`[c, o]`, the sum over positions of the products of `[n, c]` and `[n, o]`."""
    over = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, y, over, precision=EXACT, preferred_element_type=dtype)

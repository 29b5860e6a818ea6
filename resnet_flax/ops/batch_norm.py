"""Batch normalisation in training, as one operation with its own gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from resnet_flax.ops import dispatch
from resnet_flax.ops.dispatch import BatchNormImplementation
from resnet_flax.ops.linear import linear, or_zeros
from resnet_flax.ops.spec import BatchNormSpec


def relu(x: Array) -> Array:
    """The positive part; NaN propagates.

    A selection between two maps, not `max(x, 0)`: XLA's CPU compiler recomputes a function of one
    map wherever it is read, with everything before it up to the last convolutions. Along a stage's
    shortcuts that cost grows with the square of the depth.
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


OVER = (1, 2, 3)  # axes of a group's examples and positions


def batch_norm(
    spec: BatchNormSpec,
    x: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    shift: Array,
    implementation: str = "auto",
) -> tuple[Array, Array, Array]:
    """Batch normalisation, addition of `residual` and ReLU.

    Args:
      spec: its static parameters.
      x: maps `[b, h, w, c]`.
      scale: `[c]`.
      bias: the same.
      residual: with the shape of `x`, or None.
      shift: `[c]`, an estimate of the mean, such as the running one.
      implementation: 'auto' for those of `spec`, or 'xla', see `conv.conv2d`.

    Returns:
      The activations, and `[groups, c]` means and variances of `x`.
    """
    if implementation == "xla":
        return batch_norm_forward(spec, BatchNormImplementation(), x, scale, bias, residual, shift)
    return _batch_norm(spec, x, scale, bias, residual, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    spec: BatchNormSpec, x: Array, scale: Array, bias: Array, residual: Array | None, shift: Array
) -> tuple[Array, Array, Array]:
    functions = spec.implementations.map(lambda chosen: partial(batch_norm_forward, spec, chosen))
    return dispatch.call(functions, x, scale, bias, residual, shift)


def batch_norm_forward(
    spec: BatchNormSpec,
    chosen: BatchNormImplementation,
    x: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    shift: Array,
) -> tuple[Array, Array, Array]:
    """`batch_norm` by one implementation."""
    grouped = spec.grouped(x)
    statistics = {"two_pass": _two_pass, "one_pass": _one_pass}[chosen.statistics]
    mean, var = statistics(grouped, shift)
    factor = lax.rsqrt(var + spec.epsilon) * wide(scale, var)
    y = (grouped - _wide(mean)) * _wide(factor) + wide(bias, grouped)
    y = add_relu(y.reshape(x.shape), spec.activate, residual).astype(spec.dtype)
    return barrier(chosen, y), mean, var


def barrier(chosen: BatchNormImplementation, y: Array) -> Array:
    """`y`, but later operations can neither recompute it nor use it before it is rounded."""
    return lax.optimization_barrier(y) if chosen.fusion == "guided" else y


def _two_pass(x: Array, shift: Array) -> tuple[Array, Array]:
    del shift
    mean = x.mean(OVER)
    return mean, jnp.square(x - _wide(mean)).mean(OVER)


def _one_pass(x: Array, shift: Array) -> tuple[Array, Array]:
    # The variance is E[x^2] - E[x]^2, which loses digits if the mean is far from zero.
    x = x - wide(shift, x)
    mean = x.mean(OVER)
    return mean + wide(shift, mean), jnp.maximum(jnp.square(x).mean(OVER) - jnp.square(mean), 0)


def _wide(statistic: Array) -> Array:
    """`[groups, c]` as `[groups, 1, 1, 1, c]`."""
    return statistic[:, None, None, None]


def wide(values: Array, like: Array) -> Array:
    """`[c]` as `[1, ..., 1, c]`, with as many dimensions as `like`."""
    return lax.expand_dims(values, range(like.ndim - 1))


def add_relu(y: Array, activate: bool, residual: Array | None) -> Array:
    """Adds the residual, if any, and applies the ReLU if `activate`."""
    if residual is not None:
        dtype = np.promote_types(y.dtype, residual.dtype)
        y = y.astype(dtype) + residual.astype(dtype)
    return relu(y) if activate else y


@partial(_batch_norm.defjvp, symbolic_zeros=True)
def _derivative(spec, operands, tangents):  # type: ignore[no-untyped-def]
    x, scale, bias, residual, shift = operands
    y, mean, var = _batch_norm(spec, *operands)
    # With a residual, the sign of the ReLU's input does not follow from x.
    kept = None if residual is None or not spec.activate else y
    like = None if residual is None else jnp.zeros((), residual.dtype)
    residuals = (x, scale, bias, mean, var, kept, like, shift)
    tangent, gradients = partial(batch_norm_tangent, spec), partial(_gradients, spec)
    return (y, mean, var), linear(tangent, gradients, residuals, tangents, (y, mean, var))


def batch_norm_tangent(spec, residuals, tangents):  # type: ignore[no-untyped-def]
    """The tangents of `batch_norm`'s outputs; their transpose is `batch_norm_backward`."""
    x, scale, bias, mean, var, kept, _, _ = residuals
    dx, dscale, dbias = map(or_zeros, tangents[:3], (x, scale, bias))
    u, dx = spec.grouped(x) - _wide(mean), spec.grouped(dx)
    inverse = lax.rsqrt(var + spec.epsilon)
    factor = inverse * wide(scale, var)
    dmean, dvar = dx.mean(OVER), 2 * (u * dx).mean(OVER)
    dfactor = inverse * wide(dscale, var) - factor * jnp.square(inverse) * dvar / 2
    dz = (dx - _wide(dmean)) * _wide(factor) + (u * _wide(dfactor) + wide(dbias, u))
    if tangents[3] is not None:  # of the residual
        dz = dz + spec.grouped(tangents[3])
    if spec.activate:
        z = u * _wide(factor) + wide(bias, u) if kept is None else spec.grouped(kept)
        dz = jnp.where(z > 0, dz, 0)
    return dz.reshape(x.shape).astype(spec.dtype), dmean, dvar


def _gradients(spec, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = spec.implementations.map(lambda chosen: partial(batch_norm_backward, spec, chosen))
    found = dispatch.call(functions, residuals[:-1], cotangents)
    return (*found, jnp.zeros_like(residuals[-1]))


def batch_norm_backward(spec, chosen, residuals, cotangents):  # type: ignore[no-untyped-def]
    """The gradient of y = (x - mean) * factor + bias, factor = scale / sqrt(var + epsilon).

    It includes that of the residual and the ReLU. With u = x - mean, dz the gradient to the
    normalisation's output and n the number of a group's examples times positions:
    dx = factor * (dz - mean(dz) - u * mean(dz * u) / (var + epsilon)).
    """
    x, scale, bias, mean, var, kept, like = residuals
    dy, dmean, dvar = cotangents
    n = x.size // x.shape[-1] // spec.groups
    u = spec.grouped(x) - _wide(mean)
    inverse = lax.rsqrt(var + spec.epsilon)
    factor = inverse * wide(scale, var)
    dz = spec.grouped(dy)
    if spec.activate:
        z = u * _wide(factor) + wide(bias, u) if kept is None else spec.grouped(kept)
        dz = where_positive(chosen, z, dz)
    sums = dz.sum(OVER)
    products = (dz * u).sum(OVER)
    if like is not None:
        # dx is computed from the residual's gradient, which is written in any case: reading it is
        # one map less than reading the two that it is computed from. It is exact: each element is
        # dy or 0.
        dz = spec.grouped(barrier(chosen, dz.reshape(x.shape).astype(dy.dtype)))
    # Both statistics have gradients too, though a training step does not use them.
    slope = (2 * dvar - factor * jnp.square(inverse) * products) / n
    level = (dmean - factor * sums) / n
    # The last addition has two maps as operands, so it is computed once, see `relu`.
    dx = dz * _wide(factor) + (u * _wide(slope) + _wide(level))
    dresidual = None if like is None else dz.reshape(x.shape).astype(like.dtype)
    return dx.reshape(x.shape).astype(x.dtype), (products * inverse).sum(0), sums.sum(0), dresidual


def where_positive(chosen: BatchNormImplementation, z: Array, dz: Array) -> Array:
    """`dz` where `z` is positive, else zero."""
    if chosen.fusion == "guided":
        # XLA's GPU compiler would store the byte-sized result of a comparison; this form it
        # recomputes.
        return dz * jnp.maximum(jnp.sign(z), 0)
    return jnp.where(z > 0, dz, 0)

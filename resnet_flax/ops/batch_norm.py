"""Batch normalisation in training, as one operation with a gradient of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from resnet_flax.ops import dispatch
from resnet_flax.ops.dispatch import BatchNormImplementation
from resnet_flax.ops.spec import BatchNormSpec


def relu(x: Array) -> Array:
    """The positive part; NaN propagates.

    As a choice between two maps, not as `max(x, 0)`: that is to XLA's CPU compiler a function of
    one map, which it computes again wherever it is read, and with it all that lies before it up to
    the last convolutions. Along a stage's shortcuts that grows with the square of the depth.
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


OVER = (1, 2, 3)  # examples of a group, and positions


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_norm(
    spec: BatchNormSpec, x: Array, scale: Array, bias: Array, residual: Array | None, shift: Array
) -> tuple[Array, Array, Array]:
    """The activations, and `[groups, c]` means and variances of `x`."""
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
    factor = lax.rsqrt(var + spec.epsilon) * scale
    y = (grouped - _wide(mean)) * _wide(factor) + bias
    y = add_relu(y.reshape(x.shape), spec.activate, residual).astype(spec.dtype)
    return barrier(chosen, y), mean, var


def barrier(chosen: BatchNormImplementation, y: Array) -> Array:
    """`y`, which nothing after it computes again or takes before it was rounded."""
    return lax.optimization_barrier(y) if chosen.fusion == "guided" else y


def _two_pass(x: Array, shift: Array) -> tuple[Array, Array]:
    del shift
    mean = x.mean(OVER)
    return mean, jnp.square(x - _wide(mean)).mean(OVER)


def _one_pass(x: Array, shift: Array) -> tuple[Array, Array]:
    # About zero, a mean far from it would leave few digits of the difference.
    x = x - shift
    mean = x.mean(OVER)
    return mean + shift, jnp.maximum(jnp.square(x).mean(OVER) - jnp.square(mean), 0)


def _wide(statistic: Array) -> Array:
    """`[groups, c]` as `[groups, 1, 1, 1, c]`."""
    return statistic[:, None, None, None]


def add_relu(y: Array, activate: bool, residual: Array | None) -> Array:
    """What follows a normalisation."""
    if residual is not None:
        y = y + residual
    return relu(y) if activate else y


def _forward(spec, x, scale, bias, residual, shift):  # type: ignore[no-untyped-def]
    y, mean, var = batch_norm(spec, x, scale, bias, residual, shift)
    # With a residual the sign of what ReLU met does not follow from x.
    kept = None if residual is None or not spec.activate else y
    like = None if residual is None else jnp.zeros((), residual.dtype)
    return (y, mean, var), (x, scale, bias, mean, var, kept, like, shift)


def _backward(spec, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = spec.implementations.map(lambda chosen: partial(batch_norm_backward, spec, chosen))
    found = dispatch.call(functions, residuals[:-1], cotangents)
    return (*found, jnp.zeros_like(residuals[-1]))


def batch_norm_backward(spec, chosen, residuals, cotangents):  # type: ignore[no-untyped-def]
    """Of y = (x - mean) * factor + bias, factor = scale / sqrt(var + epsilon), and what follows.

    With u = x - mean, dz what arrives at the normalisation and n the examples of a group times
    its positions: dx = factor * (dz - mean(dz) - u * mean(dz * u) / (var + epsilon)).
    """
    x, scale, bias, mean, var, kept, like = residuals
    dy, dmean, dvar = cotangents
    n = x.size // x.shape[-1] // spec.groups
    u = spec.grouped(x) - _wide(mean)
    inverse = lax.rsqrt(var + spec.epsilon)
    factor = inverse * scale
    dz = spec.grouped(dy)
    if spec.activate:
        dz = where_positive(
            chosen, u * _wide(factor) + bias if kept is None else spec.grouped(kept), dz
        )
    sums = dz.sum(OVER)
    products = (dz * u).sum(OVER)
    if like is not None:
        # The residual's gradient, which is written in any case, is read again for dx: that takes
        # one map less than to read both of which it is made. It loses nothing: it is dy or zero.
        dz = spec.grouped(barrier(chosen, dz.reshape(x.shape).astype(dy.dtype)))
    # Both statistics have a gradient of their own, though a training step asks for none.
    slope = (2 * dvar - factor * jnp.square(inverse) * products) / n
    level = (dmean - factor * sums) / n
    # The last addition is of two maps, so that it is computed once, see `relu`.
    dx = dz * _wide(factor) + (u * _wide(slope) + _wide(level))
    dresidual = None if like is None else dz.reshape(x.shape).astype(like.dtype)
    return dx.reshape(x.shape).astype(x.dtype), (products * inverse).sum(0), sums.sum(0), dresidual


def where_positive(chosen: BatchNormImplementation, z: Array, dz: Array) -> Array:
    """`dz` where `z` is positive, else zero."""
    if chosen.fusion == "guided":
        # A comparison, whose output is a byte, XLA's GPU compiler stores for whoever needs it;
        # this it computes again.
        return dz * jnp.maximum(jnp.sign(z), 0)
    return jnp.where(z > 0, dz, 0)


batch_norm.defvjp(_forward, _backward)

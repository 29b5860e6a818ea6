"""A 3x3 convolution and batch normalisation of its output as one operation; see `gpu_kernels`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resnet_flax.ops import dispatch
from resnet_flax.ops.batch_norm import batch_norm_backward, batch_norm_forward, batch_norm_tangent
from resnet_flax.ops.conv import conv2d
from resnet_flax.ops.dispatch import BatchNormImplementation
from resnet_flax.ops.linear import linear, or_zeros
from resnet_flax.ops.spec import BatchNormSpec, ConvSpec

Pair = tuple[Array, Array]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def conv_batch_norm_3x3(
    norm_spec: BatchNormSpec,
    conv_spec: ConvSpec,
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    running: Pair,
) -> tuple[tuple[Array, Array, Array], Pair]:
    """`batch_norm` of a convolution's output, and the updated running mean and variance."""
    return _forward(norm_spec, conv_spec, x, kernel, scale, bias, residual, running)[0]


def _forward(norm_spec, conv_spec, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    functions = norm_spec.implementations.map(
        partial(_implementation, norm_spec, conv_spec, _unfused, _by_kernels)
    )
    y, moments, z, moved = dispatch.call(functions, x, kernel, scale, bias, residual, running)
    like = None if residual is None else jnp.zeros((), residual.dtype)
    # With a residual, the sign of the ReLU's input does not follow from z.
    signs = y if norm_spec.activate and residual is not None else None
    found = (y, moments[:1], moments[1:]), moved
    return found, (x, kernel, scale, bias, z, moments, signs, like, running)


@partial(conv_batch_norm_3x3.defjvp, symbolic_zeros=True)
def _derivative(norm_spec, conv_spec, operands, tangents):  # type: ignore[no-untyped-def]
    found, residuals = _forward(norm_spec, conv_spec, *operands)
    tangent, gradients = (partial(part, norm_spec, conv_spec) for part in (_tangent, _gradients))
    return found, linear(tangent, gradients, residuals, tangents, found)


def _tangent(norm_spec, conv_spec, residuals, tangents):  # type: ignore[no-untyped-def]
    x, kernel, scale, bias, z, moments, signs, like, running = residuals
    dx, dkernel, *rest = tangents
    moving = or_zeros(dx, x), or_zeros(dkernel, kernel)
    _, dz = jax.jvp(partial(_convolved, conv_spec), (x, kernel), moving)
    of_norm = z, scale, bias, moments[:1], moments[1:], signs, like, running[0]
    found = batch_norm_tangent(norm_spec, of_norm, (dz, *rest))
    return found, jax.tree.map(jnp.zeros_like, running)  # running statistics have no gradient


def _gradients(norm_spec, conv_spec, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = norm_spec.implementations.map(
        partial(_implementation, norm_spec, conv_spec, _unfused_gradients, _gradients_by_kernels)
    )
    (dy, dmean, dvar), _ = cotangents
    dmoments = jnp.concatenate([dmean, dvar])
    found = dispatch.call(functions, *residuals[:-1], dy, dmoments)
    return (*found, jax.tree.map(jnp.zeros_like, residuals[-1]))


def _implementation(
    norm_spec: BatchNormSpec,
    conv_spec: ConvSpec,
    unfused: Any,
    by_kernels: Any,
    chosen: BatchNormImplementation,
) -> Callable[..., Any]:
    plain = partial(unfused, norm_spec, conv_spec, chosen)
    if chosen.conv_bn_3x3 == "unfused":
        return plain
    return _derived_as(plain, partial(by_kernels, norm_spec, conv_spec))


def _derived_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the derivatives of `plain`, as kernels have none."""

    @jax.custom_jvp
    def call(*operands: Any) -> Any:
        return function(*operands)

    @call.defjvp
    def _(operands: Any, tangents: Any) -> Any:
        return function(*operands), jax.jvp(plain, operands, tangents)[1]

    return call


# One after the other ----------------------------------------------------------------------------


def _unfused(norm_spec, conv_spec, chosen, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    z = _convolved(conv_spec, x, kernel)
    y, mean, var = batch_norm_forward(norm_spec, chosen, z, scale, bias, residual, running[0])
    return y, jnp.concatenate([mean, var]), z, norm_spec.update_running(mean, var, running)


def _unfused_gradients(  # type: ignore[no-untyped-def]
    norm_spec, conv_spec, chosen, x, kernel, scale, bias, z, moments, signs, like, dy, dmoments
):
    of_norm = (z, scale, bias, moments[:1], moments[1:], signs, like)
    dz, *rest = batch_norm_backward(norm_spec, chosen, of_norm, (dy, dmoments[:1], dmoments[1:]))
    return (*_convolution_gradients(conv_spec, x, kernel, dz), *rest)


def _convolved(conv_spec: ConvSpec, x: Array, kernel: Array) -> Array:
    return conv2d(x, kernel.astype(x.dtype), *conv_spec)


def _convolution_gradients(conv_spec: ConvSpec, x: Array, kernel: Array, dz: Array) -> Any:
    # The output of this second forward pass is unused, and XLA removes it.
    _, gradient = jax.vjp(partial(_convolved, conv_spec), x, kernel)
    return gradient(dz)


# By kernels -------------------------------------------------------------------------------------


def _by_kernels(norm_spec, conv_spec, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    from resnet_flax.ops import gpu_kernels

    if _ours(conv_spec, kernel):
        z, shares = gpu_kernels.convolve(x, kernel, running[0], norm_spec.param_dtype)
    else:
        z = _convolved(conv_spec, x, kernel)
        shares = gpu_kernels.sums(z, running[0], norm_spec.param_dtype)
    y, moments, moved = gpu_kernels.normalize(norm_spec, z, shares, running, scale, bias, residual)
    return y, moments, z, moved


def _gradients_by_kernels(  # type: ignore[no-untyped-def]
    norm_spec, conv_spec, x, kernel, scale, bias, z, moments, signs, like, dy, dmoments
):
    from resnet_flax.ops import gpu_kernel_gradients

    masked = signs is not None
    passed, sums, products = gpu_kernel_gradients.sum_gradients(
        norm_spec, dy, z, moments, scale, bias, signs
    )
    dz, slopes = gpu_kernel_gradients.through_norm(
        norm_spec, passed, masked, z, sums, products, moments, scale, bias, dmoments
    )
    if _ours(conv_spec, kernel):
        dx, dkernel = gpu_kernel_gradients.gradients(x, kernel, dz, norm_spec.param_dtype)
    else:
        dx, dkernel = _convolution_gradients(conv_spec, x, kernel, dz)
    dresidual = None if like is None else passed.astype(like.dtype)
    return dx, dkernel, slopes[0], slopes[1], dresidual


def _ours(conv_spec: ConvSpec, kernel: Array) -> bool:
    """Whether our kernels also compute this convolution, as they do for most of a network's."""
    return conv_spec.strides == (1, 1) and kernel.shape[2] == kernel.shape[3]

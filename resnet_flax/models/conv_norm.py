"""A 3x3 convolution and the batch normalisation behind it as one operation; see `kernels`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from resnet_flax.models import lowering
from resnet_flax.models.conv import Pending, conv2d
from resnet_flax.models.lowering import Geometry, Normalisation
from resnet_flax.models.normalize import How, gradients, normalize, normalized

Pair = tuple[Array, Array]


def normalize_3x3(
    how: How,
    conv: Pending,
    scale: Array,
    bias: Array,
    residual: Array | None,
    running: Pair,
) -> tuple[tuple[Array, Array, Array], Pair]:
    """`normalize` of a convolution's output, and the running mean and variance after it."""
    if not conv.x.size or not how.ways.any(lambda way: way.behind_3x3 == "kernels"):
        found = normalize(how, conv.computed(), scale, bias, residual, running[0])
        return found, how.moved(*found[1:], running)
    return _normalize(how, conv.geometry, conv.x, conv.kernel, scale, bias, residual, running)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(how, geometry, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    return _forward(how, geometry, x, kernel, scale, bias, residual, running)[0]


def _forward(how, geometry, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    functions = how.ways.map(partial(_way, how, geometry, _apart, _by_kernels))
    y, moments, z, moved = lowering.call(functions, x, kernel, scale, bias, residual, running)
    like = None if residual is None else jnp.zeros((), residual.dtype)
    # With a residual the sign of what ReLU met cannot be told from z.
    signs = y if how.activate and residual is not None else None
    found = (y, moments[:1], moments[1:]), moved
    return found, (x, kernel, scale, bias, z, moments, signs, like, running)


def _backward(how, geometry, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = how.ways.map(partial(_way, how, geometry, _apart_gradients, _gradients_by_kernels))
    (dy, dmean, dvar), _ = cotangents  # nothing follows from running statistics
    dmoments = jnp.concatenate([dmean, dvar])
    found = lowering.call(functions, *residuals[:-1], dy, dmoments)
    return (*found, jax.tree.map(jnp.zeros_like, residuals[-1]))


_normalize.defvjp(_forward, _backward)


def _way(
    how: How, geometry: Geometry, apart: Any, by_kernels: Any, way: Normalisation
) -> Callable[..., Any]:
    plain = partial(apart, how, geometry, way)
    if way.behind_3x3 == "apart":
        return plain
    return _derived_as(plain, partial(by_kernels, how, geometry))


def _derived_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the derivatives of a plain one: kernels have none of their own."""

    @jax.custom_vjp
    def call(*operands: Any) -> Any:
        return function(*operands)

    call.defvjp(
        lambda *operands: (function(*operands), operands),
        lambda operands, cotangents: jax.vjp(plain, *operands)[1](cotangents),
    )
    return call


# One after the other ----------------------------------------------------------------------------


def _apart(how, geometry, way, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    z = _convolved(geometry, x, kernel)
    y, mean, var = normalized(how, way, z, scale, bias, residual, running[0])
    return y, jnp.concatenate([mean, var]), z, how.moved(mean, var, running)


def _apart_gradients(  # type: ignore[no-untyped-def]
    how, geometry, way, x, kernel, scale, bias, z, moments, signs, like, dy, dmoments
):
    of_norm = (z, scale, bias, moments[:1], moments[1:], signs, like)
    dz, *rest = gradients(how, way, of_norm, (dy, dmoments[:1], dmoments[1:]))
    return (*_convolution_gradients(geometry, x, kernel, dz), *rest)


def _convolved(geometry: Geometry, x: Array, kernel: Array) -> Array:
    return conv2d(x, kernel.astype(x.dtype), *geometry)


def _convolution_gradients(geometry: Geometry, x: Array, kernel: Array, dz: Array) -> Any:
    # What the forward pass computes once more here nobody reads.
    _, gradient = jax.vjp(partial(_convolved, geometry), x, kernel)
    return gradient(dz)


# By kernels -------------------------------------------------------------------------------------


def _by_kernels(how, geometry, x, kernel, scale, bias, residual, running):  # type: ignore[no-untyped-def]
    from resnet_flax.models import kernels

    if _ours(geometry, kernel):
        z, shares = kernels.convolve(x, kernel, running[0], how.param_dtype)
    else:
        z = _convolved(geometry, x, kernel)
        shares = kernels.sums(z, running[0], how.param_dtype)
    y, moments, moved = kernels.normalize(how, z, shares, running, scale, bias, residual)
    return y, moments, z, moved


def _gradients_by_kernels(  # type: ignore[no-untyped-def]
    how, geometry, x, kernel, scale, bias, z, moments, signs, like, dy, dmoments
):
    from resnet_flax.models import kernels

    masked = signs is not None
    passed, sums, products = kernels.sum_gradients(how, dy, z, moments, scale, bias, signs)
    dz, slopes = kernels.through_norm(
        how, passed, masked, z, sums, products, moments, scale, bias, dmoments
    )
    if _ours(geometry, kernel):
        dx, dkernel = kernels.gradients(x, kernel, dz, how.param_dtype)
    else:
        dx, dkernel = _convolution_gradients(geometry, x, kernel, dz)
    dresidual = None if like is None else passed.astype(like.dtype)
    return dx, dkernel, slopes[0], slopes[1], dresidual


def _ours(geometry: Geometry, kernel: Array) -> bool:
    """Whether there is a kernel for the convolution too, as for most of a network's."""
    return geometry.strides == (1, 1) and kernel.shape[2] == kernel.shape[3]

"""Tangents of operations that have a gradient of our own.

A `jax.custom_vjp` has no forward-mode derivatives, and the gradient of a `jax.custom_jvp` is the
transpose that JAX derives from its tangent. Here the tangent of a `custom_jvp` is one primitive,
which has our gradient as its transpose. Forward mode computes the tangent; reverse mode, in JAX the
transpose of forward mode, computes the gradient, and saves for it what we say. Programs of reverse
mode are therefore those of a `custom_vjp` with the same gradient: the tangent is not in them, and
is not even traced.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

Flat = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]

# Not `jax.custom_derivatives.linear_call`, which can be differentiated neither with respect to its
# residuals, for second derivatives, nor under `jax.vmap` (JAX 0.12).
_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True


def linear(
    tangent: Callable[[Any, Any], Any],
    gradient: Callable[[Any, Any], Any],
    residuals: Any,
    tangents: Any,
    value: Any,
) -> Any:
    """The tangent of an operation, for the rule of a `custom_jvp` with `symbolic_zeros`.

    Args:
      tangent: `tangent(residuals, tangents)` is the tangent of the value, in terms of functions
        that JAX can differentiate. Tangents that are zero are None.
      gradient: its transpose: `gradient(residuals, cotangents)` are all operands' gradients.
      residuals: what both depend on, which reverse mode saves.
      tangents: of the operands, as the rule gets them.
      value: of the operation; what is returned has its structure, shapes and types.
    """
    kept, kept_tree = jax.tree.flatten(residuals)
    values, value_tree = jax.tree.flatten(value)
    all_tangents, tree = jax.tree.flatten(tangents, is_leaf=_is_none)
    varied = [t is not None and type(t) is not SymbolicZero for t in all_tangents]

    def flat_tangent(kept: Sequence[Any], moved: Sequence[Any]) -> Sequence[Any]:
        moving = iter(moved)
        given = jax.tree.unflatten(tree, [next(moving) if one else None for one in varied])
        return jax.tree.leaves(tangent(jax.tree.unflatten(kept_tree, kept), given))

    def flat_gradient(kept: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        found = gradient(
            jax.tree.unflatten(kept_tree, kept), jax.tree.unflatten(value_tree, cotangents)
        )
        return _chosen(jax.tree.leaves(found, is_leaf=_is_none), varied)

    found = _linear_p.bind(
        *(*kept, *_chosen(all_tangents, varied)),
        tangent=flat_tangent,
        gradient=flat_gradient,
        residuals=len(kept),
        types=tuple(jax.typeof(one) for one in values),
    )
    return jax.tree.unflatten(value_tree, found)


def or_zeros(tangent: Any, like: Any) -> Any:
    """The tangent; zeros if it is None."""
    return jnp.zeros_like(like) if tangent is None else tangent


def _is_none(value: Any) -> bool:
    return value is None


def _chosen(values: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [value for value, is_chosen in zip(values, which, strict=True) if is_chosen]


def _call(*arrays: Any, tangent: Flat, residuals: int, **_: Any) -> Sequence[Any]:
    return tangent(arrays[:residuals], arrays[residuals:])


def _types(*_: Any, types: Sequence[Any], **__: Any) -> list[Any]:
    return list(types)


def _jvp(arrays: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """For second derivatives: itself in the tangents, as JAX derives it in the residuals."""
    n = params["residuals"]
    (kept, moved), (by_kept, by_moved) = ((x[:n], x[n:]) for x in (arrays, tangents))
    terms = []
    if any(type(t) is not ad.Zero for t in by_moved):
        further = map(ad.instantiate_zeros, by_moved)
        terms.append(_linear_p.bind(*kept, *further, **params))
    varied = [type(t) is not ad.Zero for t in by_kept]
    if any(varied):

        def of(*some: Any) -> Sequence[Any]:
            moving = iter(some)
            now = [next(moving) if one else x for x, one in zip(kept, varied, strict=True)]
            return params["tangent"](now, moved)  # type: ignore[no-any-return]

        terms.append(jax.jvp(of, _chosen(kept, varied), _chosen(by_kept, varied))[1])
    found = [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]
    return _linear_p.bind(*arrays, **params), found


def _transpose(cotangents: Sequence[Any], *arrays: Any, **params: Any) -> list[Any]:
    n = params["residuals"]
    found = params["gradient"](arrays[:n], [ad.instantiate_zeros(ct) for ct in cotangents])
    # A tangent that is known here is zero, as the function would not be linear otherwise.
    unknown = map(ad.is_undefined_primal, arrays[n:])
    return [None] * n + [ct if one else None for ct, one in zip(found, unknown, strict=True)]


def _batch(arrays: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """Under `jax.vmap`: maps both functions; the first axis of each result is the mapped one."""
    n, tangent, gradient = params["residuals"], params["tangent"], params["gradient"]
    kept_axes, moved_axes = tuple(axes[:n]), tuple(axes[n:])
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    mapped = partial(jax.vmap, axis_size=size)

    def mapped_tangent(kept: Sequence[Any], moved: Sequence[Any]) -> Sequence[Any]:
        return mapped(tangent, in_axes=(kept_axes, moved_axes))(tuple(kept), tuple(moved))  # type: ignore[no-any-return]

    def mapped_gradient(kept: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        found = mapped(gradient, in_axes=(kept_axes, 0))(tuple(kept), tuple(cotangents))
        return [
            gradients.sum(0) if axis is None else jnp.moveaxis(gradients, 0, axis)
            for gradients, axis in zip(found, moved_axes, strict=True)
        ]

    types = tuple(unmapped_aval(size, 0, one) for one in params["types"])
    params |= {"tangent": mapped_tangent, "gradient": mapped_gradient, "types": types}
    return _linear_p.bind(*arrays, **params), [0] * len(types)


_linear_p.def_impl(_call)
_linear_p.def_abstract_eval(_types)
mlir.register_lowering(_linear_p, mlir.lower_fun(_call, multiple_results=True))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch

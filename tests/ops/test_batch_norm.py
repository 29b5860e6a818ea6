"""Every implementation of batch normalisation has the values and gradients of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm, compiled_value_and_vjp
from flax import linen as nn

from resnet_flax.models.layers import BatchNorm
from resnet_flax.ops import BatchNormSpec, batch_norm, dispatch, heuristics


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "implementations",
    [
        {"statistics": "two_pass", "fusion": "free"},
        {"statistics": "two_pass", "fusion": "guided"},
        {"statistics": "one_pass", "fusion": "free"},
        {"statistics": "one_pass", "fusion": "guided"},
    ],
)
@pytest.mark.parametrize(
    ("groups", "relu", "with_residual"),
    [(1, True, True), (2, True, False), (2, False, True), (4, False, False)],
)
def test_normalisation_with_what_follows_it(implementations, groups, relu, with_residual):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, size=(8, 5, 4, 6)))
    residual = jnp.asarray(rng.normal(size=x.shape)) if with_residual else None
    params = {"scale": jnp.asarray(rng.normal(size=6)), "bias": jnp.asarray(rng.normal(size=6))}
    stats = {"mean": jnp.asarray(rng.normal(2, 1, size=6)), "var": jnp.ones(6)}
    norm = BatchNorm(groups, dtype=jnp.float64, param_dtype=jnp.float64)

    def ours(params, x, residual):
        variables = {"params": params, "batch_stats": stats}
        with dispatch.override(**implementations):
            return norm.apply(
                variables, x, True, activate=relu, residual=residual, mutable=["batch_stats"]
            )

    def plain(params, x, residual):
        parts = jnp.split(x, groups)
        means = jnp.stack([part.mean((0, 1, 2)) for part in parts])
        variances = jnp.stack([part.var((0, 1, 2)) for part in parts])
        y = jnp.concatenate(
            [(p - m) / jnp.sqrt(v + 1e-5) for p, m, v in zip(parts, means, variances, strict=True)]
        )
        y = y * params["scale"] + params["bias"]
        y = y if residual is None else y + residual
        new = {
            "mean": 0.9 * stats["mean"] + 0.1 * means.mean(0),
            "var": 0.9 * stats["var"] + 0.1 * variances.mean(0),
        }
        return nn.relu(y) if relu else y, jax.lax.stop_gradient({"batch_stats": new})

    assert_close_in_norm(
        compiled_value_and_vjp(ours, params, x, residual),
        compiled_value_and_vjp(plain, params, x, residual),
        1e-12,
    )


@pytest.mark.usefixtures("x64")
def test_statistics_have_gradients_of_their_own():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(8, 5, 4, 6)))
    spec = BatchNormSpec(
        2, 1e-5, False, jnp.float64, jnp.float64, heuristics.batch_norm_implementation()
    )
    one, zero = jnp.ones(6), jnp.zeros(6)

    def plain(x):
        parts = x.reshape(2, 4, 5, 4, 6)
        return parts.mean((1, 2, 3)), parts.var((1, 2, 3))

    actual = compiled_value_and_vjp(lambda x: batch_norm(spec, x, one, zero, None, zero)[1:], x)
    assert_close_in_norm(actual, compiled_value_and_vjp(plain, x), 1e-12)


def test_one_pass_is_exact_about_a_far_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(1000, 1, size=(64, 8, 8, 3)), jnp.float32)
    norm = BatchNorm(momentum=0.0)
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.full(3, 999.5), "var": jnp.ones(3)},
    }
    with dispatch.override(statistics="one_pass"):
        _, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    expected = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["var"], expected, rtol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_keeps_no_map_in_float32(residual):
    x = jnp.ones((8, 6, 6, 16), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def run(x, *added):
        y, _ = norm.apply(variables, x, True, True, *added, mutable=["batch_stats"])
        return y

    _, vjp = jax.vjp(run, x, *[x + 1] * residual)
    maps = [leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size == x.size]
    assert maps == [jnp.bfloat16] * (1 + residual)  # its input, and its output with a residual


@pytest.mark.parametrize("activate", [False, True])
def test_guided_is_the_same_bits_in_bfloat16(activate):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 8)), jnp.bfloat16)
    norm = BatchNorm(2, dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def found(fusion, dtype):
        def run(x, residual):
            y, _ = norm.apply(variables, x, True, activate, residual, mutable=["batch_stats"])
            return y

        with dispatch.override(fusion=fusion):
            return compiled_value_and_vjp(run, x, (x + 1).astype(dtype))

    for dtype in (jnp.bfloat16, jnp.float32):
        for a, b in zip(
            *(jax.tree.leaves(found(f, dtype)) for f in ("free", "guided")), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_a_gpu_is_told_what_to_write():
    x, norm = jnp.ones((2, 8, 8, 16), jnp.bfloat16), BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def loss(x):
        y, _ = norm.apply(variables, x, True, True, x, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum()

    def barriers(platform):
        program = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=(platform,))
        return program.as_text().count("optimization_barrier")

    # After the rounded activations, and before the gradient that the residual shares.
    assert barriers("cuda") == 2
    assert barriers("cpu") == barriers("tpu") == 0

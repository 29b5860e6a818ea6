"""A fused 1x1 convolution and batch normalisation computes the same as the two in sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm, compiled_value_and_vjp
from flax import linen as nn

from resnet_flax import ops
from resnet_flax.ops import BatchNormSpec, ConvSpec, batch_norm, conv2d, dispatch, heuristics
from resnet_flax.ops.dispatch import ByDevice
from resnet_flax.ops.fused_1x1 import conv_batch_norm_1x1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fusion", ["free", "guided"])
@pytest.mark.parametrize(
    ("strides", "relu", "with_residual"),
    [((1, 1), True, True), ((2, 2), True, False), ((2, 3), False, False), ((1, 1), False, True)],
)
def test_the_same_as_one_after_the_other(fusion, strides, relu, with_residual):
    x, kernel, residual, scale, bias = _widening(strides)
    residual = residual if with_residual else None

    def run(conv_bn_1x1, x, kernel, scale, bias, residual):
        implementation = dispatch.BatchNormImplementation("two_pass", fusion, conv_bn_1x1)
        others = implementation._replace(
            conv_bn_1x1="fused" if conv_bn_1x1 == "unfused" else "unfused"
        )
        implementations = ByDevice(implementation, others, others)  # so that the devices differ
        spec = BatchNormSpec(
            1, 1e-5, relu, x.dtype, jnp.promote_types(x.dtype, jnp.float32), implementations
        )
        # With the statistics, which have gradients too.
        shift = jnp.zeros_like(scale)
        return conv_batch_norm_1x1(spec, strides, x, kernel, scale, bias, residual, shift)

    operands = x, kernel, scale, bias, residual
    expected = compiled_value_and_vjp(partial(run, "unfused"), *operands)
    assert_close_in_norm(compiled_value_and_vjp(partial(run, "fused"), *operands), expected, 1e-13)
    singles = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operands)
    assert_close_in_norm(compiled_value_and_vjp(partial(run, "fused"), *singles), expected, 1e-4)

    def plain(x, kernel, scale, bias, residual):
        z = jnp.einsum("bhwc,co->bhwo", x[:, :: strides[0], :: strides[1]], kernel[0, 0])
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        y = (z - mean) / jnp.sqrt(var + 1e-5) * scale + bias
        y = y if residual is None else y + residual
        return nn.relu(y) if relu else y, mean[None], var[None]

    assert_close_in_norm(expected, compiled_value_and_vjp(plain, *operands), 1e-12)


def _widening(strides):
    rng = np.random.default_rng(0)
    shapes = (4, 6, 6, 5), (1, 1, 5, 20), (4, 6 // strides[0], 6 // strides[1], 20), 20, 20
    x, *rest = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    return jnp.maximum(x + 0.5, 0), *rest


def _conv_norm(relu, strides, x, kernel, scale, bias, residual=None):
    """As in `models.conv_norm.conv_norm`: activations, means and variances."""
    found = ops.fused(
        x.shape, kernel.shape, ConvSpec(strides), dtype=x.dtype, param_dtype=kernel.dtype
    )
    types = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    spec = BatchNormSpec(1, 1e-5, relu, *types, found or heuristics.batch_norm_implementation())
    rest = scale, bias, residual, 0 * bias
    if found is None:
        return batch_norm(spec, conv2d(x, kernel, strides), *rest)
    return conv_batch_norm_1x1(spec, strides, x, kernel, *rest)


@pytest.mark.usefixtures("x64")
def test_gradients_add_up_in_bfloat16():
    """Rounding errors of matrices are the same at all positions and would not average out."""
    rng = np.random.default_rng(0)
    x = jnp.maximum(jnp.asarray(rng.normal(0.5, 1, size=(4, 40, 40, 32))), 0).astype(jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(0, 0.1, size=(1, 1, 32, 128)), jnp.bfloat16)
    dy = jnp.asarray(rng.normal(0.3, 1, size=(4, 40, 40, 128)), jnp.bfloat16)

    def total(implementation, dtype):
        one = jnp.ones(128, jnp.promote_types(dtype, jnp.float32))

        def run(x):
            with dispatch.override(conv_bn_1x1=implementation):
                return _conv_norm(False, (1, 1), x, kernel.astype(dtype), one, 0 * one)[0]

        dx = jax.jit(lambda x, dy: jax.vjp(run, x)[1](dy)[0])(x.astype(dtype), dy.astype(dtype))
        return np.asarray(dx, np.float64).sum((0, 1, 2))

    exact = total("unfused", jnp.float64)
    unfused, fused = (np.abs(total(w, jnp.bfloat16) - exact).max() for w in ("unfused", "fused"))
    assert fused < 3 * unfused  # it was 17 times that with a constant of unrounded matrices


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    operands = _widening((2, 2))

    def product(implementation):
        """A Hessian-vector product of a function of all operands."""

        def function(*operands):
            with dispatch.override(conv_bn_1x1=implementation):
                x, kernel, residual, scale, bias = operands
                y, mean, var = _conv_norm(True, (2, 2), x, kernel, scale, bias, residual)
            return (y**3).sum() + (mean * var).sum()

        every = tuple(range(len(operands)))

        def slope(*operands):
            found = jax.grad(function, argnums=every)(*operands)
            return sum((jnp.sin(leaf) ** 2).sum() for leaf in found)

        return jax.jit(jax.grad(slope, argnums=every))(*operands)

    assert_close_in_norm(product("fused"), product("unfused"), 1e-11)


def test_what_a_1x1_convolution_makes_is_not_kept():
    x, kernel, *_ = (leaf.astype(jnp.bfloat16) for leaf in _widening((1, 1)))

    def scratch(implementation):
        def loss(x, kernels):
            for kernel in kernels:
                with dispatch.override(conv_bn_1x1=implementation):
                    zero = jnp.zeros(kernel.shape[-1])
                    y, _, _ = _conv_norm(True, (1, 1), x, kernel, zero + 1, zero)
                x = y[..., :5]
            return y.astype(jnp.float32).sum()

        operands = jnp.tile(x, (8, 4, 4, 1)), [kernel] * 16
        program = jax.jit(jax.grad(loss, argnums=1)).lower(*operands).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert scratch("fused") < 0.8 * scratch("unfused")

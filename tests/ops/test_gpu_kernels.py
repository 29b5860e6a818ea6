"""Our GPU kernels, interpreted, compute the same as the operations in sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from classifiers import classification
from comparisons import assert_close_at_every_element
from kernel_operands import ONE, fused_3x3_operands
from variables import drawn

from resnet_flax import create_model, ops
from resnet_flax.ops import BatchNormSpec, ConvSpec, dispatch, gpu_kernel_parts, gpu_kernels
from resnet_flax.ops.dispatch import ByDevice
from resnet_flax.ops.fused_3x3 import conv_batch_norm_3x3
from resnet_flax.training.steps import statistics_step


def _run(conv_bn_3x3, stride, relu, running, x, kernel, scale, bias, residual):
    """Activations, the batch's and running moments; implementations differ by device."""
    implementation = dispatch.BatchNormImplementation("one_pass", conv_bn_3x3=conv_bn_3x3)
    other = implementation._replace(conv_bn_3x3="unfused" if conv_bn_3x3 == "triton" else "triton")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    types = x.dtype, wide, ByDevice(implementation, other, other)
    norm_spec, conv_spec = (
        BatchNormSpec(1, 1e-5, relu, *types, 0.7, 1.25),
        ConvSpec((stride, stride), ONE),
    )
    return conv_batch_norm_3x3(norm_spec, conv_spec, x, kernel, scale, bias, residual, running)


def _value_and_gradients(function, *operands):
    """The function's value, and gradients of a weighted sum of it."""

    @jax.jit
    def both(*operands):
        found, vjp = jax.vjp(function, *operands)
        weights = jax.tree.map(_uneven, found)
        return found, vjp(weights)

    return both(*operands)


def _uneven(leaf):
    return jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape).astype(leaf.dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "relu", "residual"),
    [
        ((3, 8, 16, 16, 1), True, True),
        ((2, 8, 32, 32, 1), True, False),
        ((3, 8, 64, 64, 1), False, True),
        ((1, 16, 16, 16, 1), False, False),
        ((3, 16, 3, 16, 1), True, False),  # a stem
        ((2, 16, 16, 32, 2), True, True),  # the first block of a stage
    ],
)
def test_the_same_as_one_after_the_other(shape, relu, residual):
    operands, running = fused_3x3_operands(*shape, residual)
    unfused, ours = (
        _value_and_gradients(partial(_run, implementation, shape[-1], relu, running), *operands)
        for implementation in ("unfused", "triton")
    )
    assert_close_at_every_element(ours, unfused, 1e-13)


@pytest.mark.usefixtures("x64")
def test_programs_that_take_several_turns_and_shares_of_no_power_of_two(monkeypatch):
    # 7 images of 8x8: 7 tiles of 64 positions; of 16 images' 16 tiles programs take 2 or 4.
    for name in ("CONVOLVE", "GRADIENTS", "SUM", "APPLY"):
        monkeypatch.setattr(gpu_kernel_parts, name, {16: gpu_kernel_parts.Tile(64, 4)})
    for batch, most, programs in ((7, 512, 7), (16, 8, 8), (16, 5, 4)):
        monkeypatch.setattr(gpu_kernel_parts, "MOST", most)
        monkeypatch.setattr(gpu_kernel_parts, "ADDED_UP", 16 * (8 if most == 512 else 2))
        assert gpu_kernel_parts.cut(64 * batch, gpu_kernel_parts.SUM[16])[1] == programs
        operands, running = fused_3x3_operands(batch, 8, 16, 16, 1, True)
        unfused, ours = (
            _value_and_gradients(partial(_run, implementation, 1, True, running), *operands)
            for implementation in ("unfused", "triton")
        )
        assert_close_at_every_element(ours, unfused, 1e-13)


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    operands, running = fused_3x3_operands(1, 8, 16, 16, 1, True)

    def product(implementation):
        """A Hessian-vector product of a function of all operands."""

        def function(*operands):
            (y, mean, var), _ = _run(implementation, 1, True, running, *operands)
            return (y**3).sum() + (mean * var).sum()

        every = tuple(range(len(operands)))

        def slope(*operands):
            found = jax.grad(function, argnums=every)(*operands)
            return sum((jnp.sin(leaf) ** 2).sum() for leaf in found)

        return jax.jit(jax.grad(slope, argnums=every))(*operands)

    assert_close_at_every_element(product("triton"), product("unfused"), 1e-11)


def test_in_bfloat16_as_near_as_one_after_the_other():
    operands, running = fused_3x3_operands(4, 8, 32, 32, 1, True, jnp.bfloat16)
    exact, *rounded = (
        _value_and_gradients(partial(_run, implementation, 1, True, running), *given)
        for implementation, given in (
            (
                "unfused",
                (operands[0].astype(jnp.float32), *operands[1:4], operands[4].astype(jnp.float32)),
            ),
            ("unfused", operands),
            ("triton", operands),
        )
    )

    def distances(found):
        return [
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        ]

    unfused, ours = (distances(found) for found in rounded)
    assert max(unfused) < 0.05
    assert all(b <= 1.5 * a + 1e-6 for a, b in zip(unfused, ours, strict=True)), (unfused, ours)


def test_statistics_of_the_end_of_a_training_are_not_by_kernels(monkeypatch):
    """The statistics are relative to zeros, where one pass loses digits."""
    model = create_model(
        "cifar_resnet20", num_classes=5, stage_sizes=(1,), stage_features=(16,), dtype=jnp.bfloat16
    )
    x = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    variables = drawn(model, x)
    seen = []
    monkeypatch.setattr(gpu_kernels, "convolve", lambda *_: seen.append(1))
    batch = {"image": x, "label": jnp.zeros(2, jnp.int32), "mask": jnp.ones(2, bool)}
    with ops.target(single_gpu=True):
        task = classification(model, lambda x, y, step, seed: (x, y), abs).keeping_nothing()
        step = partial(statistics_step, loss_fn=task.loss_fn, prepare=task.prepare)
        jax.eval_shape(step, variables["params"], batch, 0, variables["batch_stats"], 0)
        assert not seen
        training = partial(model.apply, train=True, mutable=["batch_stats"])
        with pytest.raises(TypeError):  # training itself is
            jax.eval_shape(training, variables, x)
        assert seen

"""Named implementations, and their choice by the device that a program is lowered for."""

import jax
import jax.numpy as jnp
import pytest

from resnet_flax.errors import UserError
from resnet_flax.ops import conv, conv2d, dispatch


def test_the_device_that_a_program_is_lowered_for_decides():
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((1, 1, 16, 16))
    program = jax.jit(jax.grad(lambda x, k: conv2d(x, k).sum() ** 2, argnums=(0, 1)))

    def count(platform):
        text = program.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")

    assert count("cpu") == count("cuda") == (3, 0)
    assert count("tpu") == (0, 3)


def test_every_name_is_that_of_a_function():
    tables = {
        "forward": conv.FORWARD,
        "input_gradient": conv.INPUT_GRADIENT,
        "kernel_gradient": conv.KERNEL_GRADIENT,
    }
    assert set(tables) == set(dispatch.ConvImplementation._fields)
    for part, functions in tables.items():
        assert sorted(functions) == sorted(dispatch.IMPLEMENTATIONS[part])


def test_no_such_implementation():
    with (
        pytest.raises(
            UserError, match=r"there is no implementation forward=fft; .*forward=conv\|dot"
        ),
        dispatch.override(forward="fft"),
    ):
        pass

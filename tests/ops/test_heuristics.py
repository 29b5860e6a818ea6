"""The choice of implementations by device, shape and type."""

import jax.numpy as jnp
import pytest

from resnet_flax import ops
from resnet_flax.ops import ConvSpec, dispatch, heuristics
from resnet_flax.ops.spec import NormalizedConv

ONE = ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("size", "channels", "features", "kernel", "strides", "expected"),
    [
        (224, 3, 64, 7, 2, ("space_to_depth", "native", "space_to_depth")),
        (32, 3, 16, 3, 1, ("width_to_channels", "width_to_channels", "width_to_channels")),
        (32, 16, 16, 3, 1, ("width_to_channels", "width_to_channels", "width_to_channels")),
        (16, 32, 32, 3, 1, ("conv", "native", "native")),
        (32, 16, 32, 3, 2, ("conv", "native", "native")),
        (56, 64, 64, 3, 1, ("conv", "native", "native")),
        (56, 64, 256, 1, 1, ("dot", "dot", "dot")),
        (56, 256, 512, 1, 2, ("dot", "dot", "dot")),
    ],
)
def test_the_size_of_a_convolution_decides_on_a_gpu(
    size, channels, features, kernel, strides, expected
):
    spec = ConvSpec((strides, strides), ((kernel // 2,) * 2,) * 2)
    x, shape = (16, size, size, channels), (kernel, kernel, channels, features)
    assert heuristics.conv_implementation(x, shape, spec).gpu == expected


@pytest.mark.parametrize(
    ("size", "channels", "features", "strides", "expected"),
    [
        (56, 64, 64, 1, ("winograd", "winograd", "winograd")),
        (16, 64, 64, 1, ("winograd", "winograd", "winograd")),
        (16, 32, 32, 1, ("conv", "canonical", "winograd")),
        (32, 16, 16, 1, ("conv", "canonical", "winograd")),
        (56, 64, 8, 1, ("conv", "canonical", "canonical")),
        (4, 64, 64, 1, ("conv", "canonical", "canonical")),
        (200, 64, 64, 1, ("conv", "canonical", "canonical")),
        (2, 512, 512, 1, ("tap_matmul", "tap_matmul", "tap_matmul")),
        (56, 128, 128, 2, ("conv", "polyphase", "tap_matmul")),
        (32, 16, 32, 2, ("conv", "polyphase", "tap_matmul")),
        (32, 3, 16, 1, ("conv", "canonical", "row_im2col")),
        (14, 512, 512, 2, ("tap_matmul", "tap_matmul", "tap_matmul")),
    ],
)
def test_the_size_of_a_3x3_convolution_decides_on_a_cpu(
    size, channels, features, strides, expected
):
    spec = ConvSpec((strides, strides), ONE)
    x, kernel = (16, size, size, channels), (3, 3, channels, features)
    assert heuristics.conv_implementation(x, kernel, spec).cpu == expected


@pytest.mark.parametrize(
    ("size", "channels", "features", "strides", "dtype", "expected"),
    [
        (56, 64, 64, 1, "float32", ("conv", "canonical", "winograd")),
        (28, 128, 128, 1, "float32", ("winograd", "winograd", "winograd")),
        (14, 256, 512, 2, "float32", ("conv", "tap_matmul", "tap_matmul")),
        (2, 512, 512, 1, "float32", ("tap_matmul", "tap_matmul", "tap_matmul")),
        (28, 128, 128, 1, "bfloat16", ("conv", "canonical", "row_im2col")),
        (56, 64, 64, 1, "bfloat16", ("conv", "canonical", "winograd")),
        (2, 512, 512, 1, "bfloat16", ("conv", "canonical", "row_im2col")),
        (14, 256, 512, 2, "bfloat16", ("conv", "polyphase", "row_im2col")),
        (32, 16, 16, 1, "bfloat16", ("conv", "canonical", "winograd")),
        (8, 16, 16, 1, "float32", ("conv", "canonical", "row_im2col")),
    ],
)
def test_a_program_for_onednn_convolves_more(size, channels, features, strides, dtype, expected):
    spec = ConvSpec((strides, strides), ONE)
    x, kernel = (16, size, size, channels), (3, 3, channels, features)
    with ops.target(onednn=True):
        found = heuristics.conv_implementation(x, kernel, spec, dtype)
    assert found.cpu == expected
    assert found.gpu == heuristics.conv_implementation(x, kernel, spec, dtype).gpu
    assert not dispatch.current_target().onednn


def _triton(conv, groups=1):
    chosen = heuristics.batch_norm_implementation(conv, groups)
    return [it.conv_bn_3x3 == "triton" for it in (chosen.cpu, chosen.gpu, chosen.tpu)]


def _conv(side=32, channels=16, features=16, stride=1, dtype=jnp.bfloat16, size=3, groups=1):
    spec = ConvSpec((stride, stride), (((size // 2,) * 2),) * 2, (1, 1), groups)
    return NormalizedConv(side * side, (size, size, channels // groups, features), spec, dtype)


def test_what_the_3x3_kernels_are_chosen_for(monkeypatch):
    only_gpu, never = [False, True, False], [False] * 3
    assert _triton(_conv()) == never  # it may run on several GPUs
    with ops.target(single_gpu=True):
        for fits in (
            _conv(),
            _conv(16, 32, 32),
            _conv(8, 64, 64),
            _conv(channels=3),
            _conv(16, 16, 32, 2),
        ):
            assert _triton(fits) == only_gpu
            assert _triton(fits, groups=2) == never
        for other in (
            _conv(56, 64, 64),
            _conv(features=24),
            _conv(features=128),
            _conv(dtype=jnp.float32),
            _conv(dtype=jnp.float16),
            _conv()._replace(batch=257),  # does not compile: shared memory
            _conv()._replace(param_dtype=jnp.bfloat16),
            _conv(16, 64, 64),
            _conv(28),
            _conv(size=1),
            _conv(size=7),
            _conv(groups=4),
        ):
            assert _triton(other) == never
        monkeypatch.setattr(dispatch, "has_triton", lambda: False)
        assert _triton(_conv()) == never
    with dispatch.override(conv_bn_3x3="triton"):
        assert _triton(_conv(dtype=jnp.float32)) == [True] * 3
        assert _triton(_conv(), groups=2) == never
        assert _triton(_conv(size=1)) == _triton(_conv(features=24)) == never

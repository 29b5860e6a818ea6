"""The convolution's own gradients against JAX's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models.layers import Conv
from resnet_flax.ops import conv2d

CASES = [
    # h, w, channels, features, kernel, strides, padding, dilation, groups
    (8, 8, 3, 4, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    (8, 7, 4, 6, (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 2),
    (9, 8, 4, 8, (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    (16, 15, 3, 4, (7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), 1),
    (12, 13, 6, 6, (3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2), 3),
    (13, 12, 4, 4, (3, 3), (2, 3), ((2, 1), (0, 3)), (2, 1), 4),
    (11, 11, 2, 4, (2, 5), (3, 2), ((0, 0), (1, 0)), (1, 2), 2),
    (9, 9, 2, 2, (3, 3), (4, 4), ((1, 1), (1, 1)), (1, 1), 1),
]


def _example(case, dtype):
    h, w, c, o, kernel, strides, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, h, w, c)), dtype)
    k = jnp.asarray(rng.normal(size=(*kernel, c // groups, o)), dtype)
    settings = (strides, padding, dilation, groups)

    def plain(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            strides,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return x, k, settings, plain


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_jax(case):
    x, k, settings, plain = _example(case, jnp.float64)
    expected, expected_vjp = jax.vjp(plain, x, k)
    actual, vjp = jax.vjp(lambda x, k: conv2d(x, k, *settings), x, k)
    assert np.linalg.norm(actual - expected) <= 1e-13 * np.linalg.norm(expected)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=actual.shape))
    for ours, theirs in zip(vjp(dy), expected_vjp(dy), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-13 * np.linalg.norm(theirs)


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    x, k, settings, plain = _example(CASES[1], jnp.float64)

    def curvature(f):
        inner = jax.grad(lambda x, k: jnp.sum(f(x, k) ** 3), argnums=1)
        return jax.grad(lambda x, k: jnp.sum(inner(x, k) ** 2), argnums=(0, 1))(x, k)

    ours = curvature(lambda x, k: conv2d(x, k, *settings))
    for actual, expected in zip(ours, curvature(plain), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


def _layouts(platform):
    """Dimension numbers of every convolution in the lowered gradient."""
    x, k, settings, _ = _example(CASES[1], jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, k: conv2d(x, k, *settings).sum() ** 2, argnums=(0, 1)))
    text = gradient.trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"dim_numbers = (\[[^,]*.*?\]->\[.*?\])", text)


def test_on_cpu_every_convolution_is_canonical_and_elsewhere_jax_decides():
    canonical = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert _layouts("cpu") == [canonical] * 3
    assert len(_layouts("cuda")) == 3
    assert set(_layouts("cuda")) != {canonical}


def test_module_pads_to_keep_the_size_and_halves_by_stride():
    x = jnp.ones((1, 9, 9, 4))
    for settings, size in (({}, 9), ({"strides": 2}, 5), ({"dilation": 2}, 9), ({"padding": 0}, 7)):
        y, _ = Conv(8, **settings).init_with_output(jax.random.key(0), x)
        assert y.shape == (1, size, size, 8)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="groups=3 must divide the 4 input and the 6 output"):
        Conv(6, groups=3).init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))

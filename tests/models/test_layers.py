"""Convolution and batch normalisation as modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models.layers import BatchNorm, Conv


def test_module_pads_to_keep_the_size_and_halves_by_stride():
    x = jnp.ones((1, 9, 9, 4))
    for settings, size in (({}, 9), ({"strides": 2}, 5), ({"dilation": 2}, 9), ({"padding": 0}, 7)):
        y, _ = Conv(8, **settings).init_with_output(jax.random.key(0), x)
        assert y.shape == (1, size, size, 8)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="groups=3 must divide the 4 input and the 6 output"):
        Conv(6, groups=3).init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))


def _apply(x, train, groups=1, **settings):
    norm = BatchNorm(groups, **settings)
    variables = norm.init(jax.random.key(0), x, False)
    variables["params"] = {"scale": jnp.arange(1.0, 4), "bias": jnp.arange(3.0)}
    variables["batch_stats"] = {"mean": jnp.array([0.5, 0, 1]), "var": jnp.array([2.0, 1, 3])}
    return norm.apply(variables, x, train, mutable=["batch_stats"])


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(8, 5, 4, 3)), jnp.float32)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_training_normalises_each_group_by_itself(x, groups):
    y, updated = _apply(x, True, groups)
    parts = np.split(np.asarray(x, np.float64), groups)
    means = np.stack([part.mean((0, 1, 2)) for part in parts])
    variances = np.stack([part.var((0, 1, 2)) for part in parts])
    expected = np.concatenate(
        [
            (part - m) / np.sqrt(v + 1e-5) * [1, 2, 3] + [0, 1, 2]
            for part, m, v in zip(parts, means, variances, strict=True)
        ]
    )
    np.testing.assert_allclose(y, expected, atol=2e-5)
    running = updated["batch_stats"]
    np.testing.assert_allclose(running["mean"], [0.45, 0, 0.9] + 0.1 * means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running["var"], [1.8, 0.9, 2.7] + 0.1 * variances.mean(0), rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them(x):
    y, updated = _apply(x, False)
    expected = (x - np.array([0.5, 0, 1])) / np.sqrt(np.array([2, 1, 3]) + 1e-5)
    expected = expected * np.array([1, 2, 3]) + np.array([0, 1, 2])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(updated["batch_stats"]["var"], [2, 1, 3])


def test_bfloat16_keeps_float32_statistics(x):
    shifted = x + 1000  # a bfloat16 mean would be off by up to 4
    y, updated = _apply(shifted.astype(jnp.bfloat16), True, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    mean = updated["batch_stats"]["mean"]
    assert mean.dtype == jnp.float32
    exact = np.asarray(shifted.astype(jnp.bfloat16), np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(mean, 0.9 * np.array([0.5, 0, 1]) + 0.1 * exact, rtol=1e-6)


def test_batch_must_divide_into_the_groups(x):
    with pytest.raises(ValueError, match="a batch of 8 cannot be divided into 3 groups"):
        _apply(x, True, groups=3)

"""Sums on the device against each metric computed directly."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from resnet_flax.evaluation.metrics import BINS, METRICS
from resnet_flax.evaluation.result import Metrics, interval

N, CLASSES = 400, 12


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(N, CLASSES)) * 2
    labels = rng.integers(0, CLASSES, N)
    logits[np.arange(N), labels] += 1
    return logits, labels


def _result(logits, labels, size, expected=N, valid_labels=None, labelled=None):
    """The result of batches of `size`, the last of which is padded with nonsense."""
    metrics = Metrics(CLASSES, more=METRICS)
    states = metrics.zeros(jnp.float64)
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        n = len(labels[part])
        batch = np.full((size, CLASSES), np.nan)
        batch[:n] = logits[part]
        label = np.zeros(size, np.int32)
        label[:n] = labels[part]
        sets = None
        if valid_labels is not None:
            sets = np.ones((size, CLASSES), bool)
            sets[:n] = valid_labels[part]
            sets = jnp.asarray(sets)
        mask = jnp.arange(size) < n
        states = metrics.add(states, jnp.asarray(batch), jnp.asarray(label), mask, sets)
    return metrics.result(states, expected, len(labels) if labelled is None else labelled)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 7, 400, 512])
def test_every_metric_is_what_its_definition_says(examples, size):
    logits, labels = examples
    result = _result(logits, labels, size)
    log_p = log_softmax(logits, axis=1)
    best = np.argsort(-logits, axis=1)
    wrong = best[:, 0] != labels
    assert result.count == N
    assert result.error == wrong.mean()
    assert result.errors == wrong.sum()
    rates = [wrong[labels == label].mean() for label in range(CLASSES)]
    np.testing.assert_allclose(result.more["balanced_error"], np.mean(rates), rtol=1e-12)
    assert result.top5_error == (best[:, :5] != labels[:, None]).all(1).mean()
    np.testing.assert_allclose(result.loss, -log_p[np.arange(N), labels].mean(), rtol=1e-12)
    confidence = np.exp(log_p.max(1))
    edges = np.linspace(0, 1, BINS + 1)
    distance = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gap = abs(confidence[inside].mean() - (~wrong[inside]).mean())
            distance += inside.mean() * gap
    np.testing.assert_allclose(result.calibration_error, distance, rtol=1e-10)
    of_class = [(labels == c) for c in range(CLASSES)]
    assert result.class_counts == tuple(int(c.sum()) for c in of_class)
    assert result.class_errors == tuple(int(wrong[c].sum()) for c in of_class)


@pytest.mark.usefixtures("x64")
def test_several_right_labels(examples):
    """ImageNet ReaL: any of them is correct; examples without one do not count."""
    logits, labels = examples
    rng = np.random.default_rng(1)
    valid_labels = rng.random((N, CLASSES)) < 0.15
    has = valid_labels.any(1)
    assert 20 < (~has).sum() < 200
    result = _result(logits, labels, 64, valid_labels=valid_labels, labelled=int(has.sum()))
    best = np.argsort(-logits, axis=1)
    right = np.take_along_axis(valid_labels, best, 1)
    assert result.count == has.sum()
    assert result.error == 1 - right[has, 0].mean()
    assert result.top5_error == pytest.approx(1 - right[has, :5].any(1).mean(), abs=1e-12)
    p = np.exp(log_softmax(logits, axis=1))
    expected = -np.log((p * valid_labels).sum(1)[has]).mean()
    np.testing.assert_allclose(result.loss, expected, rtol=1e-12)
    with pytest.raises(RuntimeError, match=f"counted {has.sum()} labelled examples of {N}"):
        _result(logits, labels, 64, valid_labels=valid_labels)


@pytest.mark.usefixtures("x64")
def test_another_count_than_the_split_s_is_an_error(examples):
    logits, labels = examples
    with pytest.raises(RuntimeError, match="counted 400 examples of 401"):
        _result(logits, labels, 64, expected=401)


def test_sums_of_many_batches_lose_nothing_that_is_printed():
    """In float32, with 1.28 million examples: plain sums gave a calibration error 6 % off."""
    metrics = Metrics(2)
    step = jax.jit(metrics.add)
    logits = jnp.zeros((1000, 2)).at[:, 0].set(6.2)
    confidence = float(jax.nn.softmax(logits[0])[0].astype(float))
    labels = jnp.asarray(np.arange(1000) % 1000 == 0, jnp.int32)  # one in a thousand is wrong
    states, mask = metrics.zeros(), jnp.ones(1000, bool)
    for _ in range(1280):
        states = step(states, logits, labels, mask)
    result = metrics.result(states, 1_280_000, 1_280_000)
    assert result.error == 0.001
    assert result.calibration_error == pytest.approx(abs(confidence - 0.999), rel=1e-3)
    expected = 0.999 * np.log1p(np.exp(-6.2)) + 0.001 * np.log1p(np.exp(6.2))
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_equal_logits_rank_in_the_order_of_classes():
    metrics = Metrics(CLASSES)
    labels = jnp.arange(CLASSES, dtype=jnp.int32)
    logits = jnp.zeros((CLASSES, CLASSES))
    states = metrics.add(metrics.zeros(), logits, labels, jnp.ones(CLASSES, bool))
    np.testing.assert_array_equal(states["class_errors"]["errors"], [0] + [1] * 11)
    np.testing.assert_array_equal(states["class_errors5"]["errors"], [0] * 5 + [1] * 7)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_never_right(value):
    logits = jnp.zeros((1, CLASSES)).at[0, 3].set(value)
    one, few = jnp.ones(1, bool), Metrics(3)
    states = few.add(few.zeros(), jnp.array([[0, value, 0]]), jnp.array([1]), one)
    assert int(states["class_errors5"]["errors"].sum()) == 1
    for label in (0, 3):
        metrics = Metrics(CLASSES)
        states = metrics.add(metrics.zeros(), logits, jnp.array([label]), one)
        assert int(states["class_errors"]["errors"].sum()) == 1
        assert int(states["class_errors5"]["errors"].sum()) == 1


@pytest.mark.parametrize(
    ("errors", "count", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)
    [(827, 10_000, 0.07746, 0.08826), (0, 100, 0.0, 0.03699), (100, 100, 0.96301, 1.0)],
)
def test_intervals_are_wilson_s(errors, count, low, high):
    assert interval(errors, count) == pytest.approx((low, high), abs=1e-5)
    from scipy.stats import binomtest

    theirs = binomtest(errors, count).proportion_ci(method="wilson")
    assert interval(errors, count) == pytest.approx((theirs.low, theirs.high), abs=1e-6)

"""Records of training on the host."""

import ml_collections
import numpy as np
import optax
import pytest

from resnet_flax.training.metrics_logger import RATES, MetricsLogger
from resnet_flax.training.writers import Writers, read_metrics


class NoInput:
    """An input that never waits."""

    most, waited, error = 100, 0.0, None

    def advance(self, state, step, n):
        """Never asked."""
        raise AssertionError


@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.5),
        optax.join_schedules(
            [optax.constant_schedule(0.01), optax.piecewise_constant_schedule(0.1, {1000: 0.1})],
            [400],
        ),
        optax.cosine_decay_schedule(0.1, 2 * RATES + 77),
    ],
)
def test_learning_rates_are_computed_many_at_a_time(schedule, tmp_path):
    """Computed one by one, each would wait on a GPU for the steps dispatched before it."""
    calls, start, steps = [], 5, 2 * RATES + 77

    def counted(step):
        calls.append(1)
        return schedule(step)

    config = ml_collections.ConfigDict({"log": {"every": 1}, "steps": steps, "batch_size": 1})
    with Writers(tmp_path, start, steps, tensorboard=False, bar=False, silent=False) as writers:
        meter = MetricsLogger(config, counted, writers, NoInput())
        for first in range(start, steps, NoInput.most):
            n = min(NoInput.most, steps - first)
            names = "loss", "errors", "count", "grad_norm", "param_norm"
            meter.add(first, n, dict.fromkeys(names, np.ones(n)))
        meter.read()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(start + 1, steps + 1))
    expected = [float(schedule(record["step"] - 1)) for record in records]
    found = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(found, expected, 1e-6, atol=1e-8)  # float32's rounding of 0.1
    assert len(calls) == 3

"""Evaluation batch by batch: how many are in flight, and what its caller may do meanwhile."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import sharding
from resnet_flax.data.sources import ArraySource
from resnet_flax.evaluation.evaluate import evaluate
from resnet_flax.evaluation.result import Metrics

BATCHES = 10
SOURCE = ArraySource(np.zeros((80, 2, 2, 1), np.uint8), np.zeros(80, np.int32), tuple("abc"))


class _Sum:
    """A mock of an array that a device computes: ready when somebody waits for it."""

    def __init__(self, step: "_Step") -> None:
        self._step, self._ready = step, False

    def block_until_ready(self) -> "_Sum":
        self._step.under_way -= not self._ready
        self._ready = True
        return self


class _Step:
    """An evaluation step that counts how many are in flight, and the maximum."""

    def __init__(self) -> None:
        self.begun = self.under_way = self.most = 0

    def __call__(self, variables, batch, sums):
        self.begun += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        seen = int(batch["mask"].sum())
        count = sums["class_counts"]["count"].at[0].add(seen)
        counted = {"seen": sums["seen"] + seen, "class_counts": {"count": count}}
        return {**sums, **counted, "waited": _Sum(self)}


def _batches():
    for _ in range(BATCHES):
        yield {"mask": np.ones(8, bool)}


def _evaluate(step, **more):
    variables = {"params": jnp.zeros(1)}
    return evaluate(Metrics(3), step, variables, _batches(), sharding.make_mesh(), SOURCE, **more)


def test_no_more_than_two_batches_are_under_way():
    step = _Step()
    _evaluate(step)
    assert step.begun == BATCHES
    assert step.most == 2


def test_whoever_watches_the_batches_can_end_the_evaluation():
    seen = []

    def watch(done):
        seen.append(done)
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        _evaluate(_Step(), after_batch=watch)
    assert seen == list(itertools.islice(itertools.count(1), 3))

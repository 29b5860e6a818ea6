"""Exact metrics: states that are added up over batches on the device, and read on the host.

A metric is one class: the state of a batch, how two states merge, and what the state of a split
says. `Metrics` computes several from the same outputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Bins of the calibration error, as in Guo et al. 2017.
BINS = 15

State = dict[str, Array]


class Outputs(NamedTuple):
    """What a metric of a classifier sees of a batch.

    Attributes:
      logits: `[b, classes]`.
      label: `[b]`.
      counted: `[b]`, false for examples that do not count: padding, and those without a label.
      rank: `[b]`, how many classes rank before the correct one: 0 is a correct prediction. Equal
        logits rank in the order of classes, as in argmax; of a logit that is not finite, it is
        the last rank.
      loss: `[b]`, negative log likelihood in nats, 0 where an example does not count.
      confidence: `[b]`, the largest probability, 0 where an example does not count.
    """

    logits: Float[Array, "b classes"]
    label: Int[Array, " b"]
    counted: Bool[Array, " b"]
    rank: Int[Array, " b"]
    loss: Float[Array, " b"]
    confidence: Float[Array, " b"]


def outputs_of(
    logits: Float[Array, "b classes"],
    label: Int[Array, " b"],
    mask: Bool[Array, " b"],
    valid_labels: Bool[Array, "b classes"] | None = None,
) -> Outputs:
    """What metrics see of a batch.

    Args:
      logits: of the examples.
      label: of the examples.
      mask: false for padding.
      valid_labels: the correct classes where an example may have several (ImageNet ReaL): any of
        them is correct, and the likelihood is that of all. An example without any does not count.
    """
    log_p = jax.nn.log_softmax(logits)
    if valid_labels is None:
        rank, loss = _rank(logits, label), -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]
        counted = mask
    else:
        rank = _rank(logits, jnp.where(valid_labels, logits, -jnp.inf).argmax(1))
        loss = -jax.nn.logsumexp(jnp.where(valid_labels, log_p, -jnp.inf), 1)
        counted = mask & valid_labels.any(1)
    loss = jnp.where(counted, loss, 0)  # not a product: padding may give NaN or infinity
    confidence = jnp.where(counted, jnp.exp(log_p.max(1)), 0)
    return Outputs(logits, label, counted, rank, loss, confidence)


def _rank(logits: Float[Array, "b classes"], label: Int[Array, " b"]) -> Int[Array, " b"]:
    """How many classes rank before the label; the last rank if a logit is not finite."""
    classes = logits.shape[-1]
    own = jnp.take_along_axis(logits, label[:, None], 1)
    before = jnp.arange(classes)[None, :] < label[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(1, dtype=jnp.int32)
    return jnp.where(jnp.isfinite(logits).all(1), rank, max(classes, 5))


class Metric:
    """A metric: override `of_batch` and `compute`, and `merge` if states are not added."""

    def of_batch(self, outputs: Outputs) -> State:
        """The state of a batch: arrays whose shapes do not depend on its size."""
        raise NotImplementedError

    def merge(self, a: State, b: State) -> State:
        """The state of two batches together; a state of zeros must change nothing."""
        return jax.tree.map(jnp.add, a, b)

    def compute(self, state: Mapping[str, np.ndarray]) -> Any:
        """What the state of a split says: a number, or several as lists; on the host."""
        raise NotImplementedError


def _per_class(values: Array, outputs: Outputs) -> Array:
    """Sums over the examples of each label, `[classes]`."""
    return jnp.zeros(outputs.logits.shape[-1], values.dtype).at[outputs.label].add(values)


class Count(Metric):
    """The number of examples of each class that count."""

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        return {"count": _per_class(outputs.counted.astype(jnp.int32), outputs)}

    def compute(self, state: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """One number for each class."""
        return tuple(map(int, state["count"]))


class Errors(Metric):
    """The number of wrong predictions of each class.

    Args:
      k: a prediction is correct if its label is among the `k` classes of the greatest logits.
    """

    def __init__(self, k: int = 1) -> None:
        self.k = k

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        wrong = outputs.counted & (outputs.rank >= self.k)
        return {"errors": _per_class(wrong.astype(jnp.int32), outputs)}

    def compute(self, state: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """One number for each class."""
        return tuple(map(int, state["errors"]))


class _Compensated(Metric):
    """A sum with its accumulated rounding error, so that millions of terms lose no digits."""

    def merge(self, a: State, b: State) -> State:
        """See `Metric`."""
        lost = _lost(a["sum"], b["sum"])
        return {"sum": a["sum"] + b["sum"], "rest": a["rest"] + b["rest"] + lost}

    def total(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
        """The sum in float64."""
        return state["sum"].astype(np.float64) + state["rest"]


def _lost(a: Array, b: Array) -> Array:
    """What `a + b` loses by rounding, exactly (Knuth, The Art of Computer Programming, 4.2.2)."""
    total = a + b
    part = total - a
    return (a - (total - part)) + (b - part)


class Loss(_Compensated):
    """The sum of the negative log likelihoods, in nats."""

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        total = _per_class(outputs.loss, outputs)
        return {"sum": total, "rest": jnp.zeros_like(total)}

    def compute(self, state: Mapping[str, np.ndarray]) -> float:
        """Over all classes."""
        return float(self.total(state).sum())


class Calibration(_Compensated):
    """The expected calibration error times the number of examples (Guo et al. 2017, eq. 3).

    `BINS` bins of equal width; in each, how much confidence exceeds accuracy.
    """

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        bins = jnp.clip((outputs.confidence * BINS).astype(jnp.int32), 0, BINS - 1)
        # These terms are small; a plain sum of confidences would be large and lose digits.
        correct = (outputs.rank < 1).astype(outputs.confidence.dtype)
        excess = jnp.where(outputs.counted, outputs.confidence - correct, 0)
        total = jnp.zeros(BINS, excess.dtype).at[bins].add(excess)
        return {"sum": total, "rest": jnp.zeros_like(total)}

    def compute(self, state: Mapping[str, np.ndarray]) -> float:
        """Over all bins."""
        return float(np.abs(self.total(state)).sum())


class Confusion(Metric):
    """The number of examples of each label that get each prediction.

    A correct prediction counts as the label, even if it was another of several correct ones.
    """

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        classes = outputs.logits.shape[-1]
        predicted = jnp.where(outputs.rank < 1, outputs.label, outputs.logits.argmax(1))
        table = jnp.zeros((classes, classes), jnp.int32)
        hits = outputs.counted.astype(jnp.int32)
        return {"confusion": table.at[outputs.label, predicted].add(hits)}

    def compute(self, state: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
        """`[label][prediction]`."""
        return tuple(map(tuple, state["confusion"].tolist()))


class BalancedError(Metric):
    """The mean over classes of the top-1 error rate, in which rare classes weigh as much."""

    def of_batch(self, outputs: Outputs) -> State:
        """See `Metric`."""
        return Count().of_batch(outputs) | Errors().of_batch(outputs)

    def compute(self, state: Mapping[str, np.ndarray]) -> float:
        """Of the classes that have examples."""
        there = state["count"] > 0
        return float((state["errors"][there] / state["count"][there]).mean())


# By a name in `eval.metrics`: metrics besides those that `result.Metrics` always has.
METRICS: dict[str, Metric] = {"balanced_error": BalancedError()}

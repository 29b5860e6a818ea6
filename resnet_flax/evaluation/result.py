"""The metrics of a classifier on a split, and their result."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resnet_flax.errors import SettingError, UserError
from resnet_flax.evaluation.metrics import (
    Calibration,
    Confusion,
    Count,
    Errors,
    Loss,
    Metric,
    outputs_of,
)

States = dict[str, Any]

# What metrics.jsonl and result.json say besides `Result.more`.
RESERVED = (
    *("split", "step", "count", "loss", "error", "errors", "top5_error", "data", "config"),
    *("commit", "device", "versions", "sessions", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The metrics of a split.

    Attributes:
      count: number of examples that count.
      error: top-1 error rate, between 0 and 1.
      top5_error: top-5 error rate.
      loss: mean negative log likelihood, in nats.
      calibration_error: expected calibration error (Guo et al. 2017, eq. 3) with `BINS` bins of
        equal width: the mean difference between confidence and accuracy.
      class_counts: examples of each class.
      class_errors: how many of these are wrong.
      confusion: `[label][prediction]` numbers of examples, if they were counted.
      more: the values of more metrics by name, see `METRICS`.
    """

    count: int
    error: float
    top5_error: float
    loss: float
    calibration_error: float
    class_counts: tuple[int, ...]
    class_errors: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of wrong first predictions."""
        return sum(self.class_errors)

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl says of an evaluation."""
        rates = {"loss": self.loss, "error": self.error, "top5_error": self.top5_error}
        return {**rates, "count": self.count, **self.more}

    def final(self) -> dict[str, Any]:
        """What result.json says of the evaluation after the last step."""
        whole = {"errors": self.errors, "count": self.count, "top5_error": self.top5_error}
        return {**whole, "loss": self.loss, **self.more}

    def __str__(self) -> str:
        more = "".join(f", {name} {_short(value)}" for name, value in self.more.items())
        counted = f"{self.errors} of {self.count}, loss {self.loss:.4f}{more}"
        return f"error: {100 * self.error:.2f} % ({counted})"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class Metrics:
    """The metrics of a classifier, whose states add up over batches.

    Args:
      classes: number of outputs.
      confusion: count predictions by label too.
      more: further metrics by name, see `METRICS`.
    """

    def __init__(
        self, classes: int, *, confusion: bool = False, more: Mapping[str, Any] | None = None
    ) -> None:
        self._classes = classes
        self._more = dict(more or {})
        for name, metric in self._more.items():
            _check_metric(name, metric)
        self._metrics: dict[str, Metric] = {
            "class_counts": Count(),
            "class_errors": Errors(),
            "class_errors5": Errors(5),
            "loss": Loss(),
            "calibration": Calibration(),
            **({"confusion": Confusion()} if confusion else {}),
            **{f"more/{name}": metric for name, metric in self._more.items()},
        }

    def zeros(self, dtype: Any = jnp.float32) -> States:
        """The states before the first batch; `dtype` is that of the logits."""
        logits = jax.ShapeDtypeStruct((1, self._classes), dtype)
        label, mask = (jax.ShapeDtypeStruct((1,), kind) for kind in (jnp.int32, jnp.bool_))
        shapes = jax.eval_shape(self._of_batch, logits, label, mask)
        zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
        states: States = jax.device_put(zeros)
        return states

    def _of_batch(self, logits: Array, label: Array, mask: Array, valid: Any = None) -> States:
        outputs = outputs_of(logits, label, mask, valid)
        states = {name: metric.of_batch(outputs) for name, metric in self._metrics.items()}
        return {"seen": mask.sum(dtype=jnp.int32), **states}

    def add(
        self,
        states: States,
        logits: Float[Array, "b classes"],
        label: Int[Array, " b"],
        mask: Bool[Array, " b"],
        valid_labels: Bool[Array, "b classes"] | None = None,
    ) -> States:
        """The states with a batch added; see `outputs_of` for the arguments."""
        new = self._of_batch(logits, label, mask, valid_labels)
        merged = {
            name: metric.merge(states[name], new[name]) for name, metric in self._metrics.items()
        }
        for name in self._more:
            _check_state(name, states[f"more/{name}"], merged[f"more/{name}"])
        return {"seen": states["seen"] + new["seen"], **merged}

    def result(self, states: States, expected: int, labelled: int | None) -> Result:
        """The metrics of a split; checks that each example was seen once.

        Args:
          states: of all batches.
          expected: number of examples of the split.
          labelled: how many of these have a label; None if unknown.

        Raises:
          RuntimeError: the number of examples seen is not `expected`, or of those counted
            `labelled`.
          UserError: no example has a label.
        """
        on_host = jax.tree.map(np.asarray, jax.device_get(states))
        seen, count = int(on_host["seen"]), int(on_host["class_counts"]["count"].sum())
        if seen != expected:
            raise RuntimeError(f"evaluation counted {seen} examples of {expected}")
        if labelled is not None and count != labelled:
            raise RuntimeError(f"evaluation counted {count} labelled examples of {labelled}")
        if not count:
            raise UserError("no example of the split has a label; give a split with labels")
        found = {name: m.compute(on_host[name]) for name, m in self._metrics.items()}
        return Result(
            count=count,
            error=sum(found["class_errors"]) / count,
            top5_error=sum(found["class_errors5"]) / count,
            loss=found["loss"] / count,
            calibration_error=found["calibration"] / count,
            class_counts=found["class_counts"],
            class_errors=found["class_errors"],
            confusion=found.get("confusion"),
            more={name: _plain(name, found[f"more/{name}"]) for name in self._more},
        )


def _check_metric(name: str, metric: Any) -> None:
    """Raises UserError if a metric of `METRICS`, which may be a user's own, is none."""
    if name in RESERVED:
        raise UserError(f"a metric cannot be called {name!r}, which results have already")
    own = isinstance(metric, Metric)
    methods = ("of_batch", "compute")
    if not own or any(getattr(type(metric), m) is getattr(Metric, m) for m in methods):
        raise UserError(
            f"the metric {name!r} is not complete: METRICS[{name!r}] must be an object of a class "
            "that is derived from resnet_flax.evaluation.metrics.Metric and overrides of_batch and "
            "compute"
        )


def _check_state(name: str, before: Any, after: Any) -> None:
    """Raises UserError if the states of batches of several sizes would not have one shape."""
    then, now = (
        [
            (path, leaf.shape, leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        ]
        for state in (before, after)
    )
    if then != now:
        raise UserError(
            f"the state of the metric {name!r} changes its shape or type from batch to batch; "
            "of_batch must return arrays whose shapes do not depend on the batch, such as sums "
            "over its examples"
        )


def _plain(name: str, value: Any) -> Any:
    """What a metric computed, as JSON has it.

    Raises:
      UserError: JSON does not have it.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"the metric {name!r} is {value!r}; compute must return a finite number, a list of "
            "them, or None where it is not defined;",
            "eval.metrics",
            "a run continues without it by another eval.metrics",
        ) from error
    return value


def interval(errors: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of an error rate, of 95 % by default (Wilson 1927).

    It keeps its coverage for few errors too, unlike the normal interval `rate ± z * std`.
    """
    rate, share = errors / count, z**2 / count
    centre = (rate + share / 2) / (1 + share)
    reach = z / (1 + share) * math.sqrt(rate * (1 - rate) / count + share / (4 * count))
    # Rounding must not exclude the rate itself if it is 0 or 1.
    return max(0.0, min(rate, centre - reach)), min(1.0, max(rate, centre + reach))

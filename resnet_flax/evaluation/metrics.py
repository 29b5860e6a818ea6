"""Exact metrics: sums over examples on the device, divided once on the host."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from resnet_flax.errors import UserError

Sums = dict[str, Array]

# Bins of the calibration error, as in Guo et al. 2017.
BINS = 15


def zero_sums(classes: int, dtype: Any = jnp.float32, *, confusion: bool = False) -> Sums:
    """The sums before the first batch.

    Args:
      classes: number of classes.
      dtype: of the logits, and of the sums that are not counts.
      confusion: count predictions by label, `[classes, classes]`.
    """
    counts = {
        name: jnp.zeros(n, jnp.int32)
        for name, n in (
            ("seen", ()),
            ("count", classes),
            ("errors", classes),
            ("errors5", classes),
        )
    }
    # Each sum that is not a count, and its accumulated rounding error (compensated summation).
    sums = {
        name + part: jnp.zeros(n, dtype)
        for name, n in (("loss", classes), ("bin_excess", BINS))
        for part in ("", "_rest")
    }
    if confusion:
        counts["confusion"] = jnp.zeros((classes, classes), jnp.int32)
    return {**counts, **sums}


def add(
    sums: Sums,
    logits: Float[Array, "b classes"],
    label: Int[Array, " b"],
    mask: Bool[Array, " b"],
    valid_labels: Bool[Array, "b classes"] | None = None,
) -> Sums:
    """Adds a batch.

    A prediction is correct if its label has the greatest logit (top-1), or one of the five greatest
    (top-5); equal logits rank in the order of classes, as in argmax. A NaN logit is never correct.

    Args:
      sums: of the previous batches.
      logits: of the examples.
      label: of the examples; errors are also counted per label.
      mask: false for padding, which adds nothing.
      valid_labels: the correct classes where an example may have several (ImageNet ReaL): any of
        them is correct, and the likelihood is that of all. An example without any is seen, but does
        not count.
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
    bins = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    of_class = {
        "count": counted,
        "errors": counted & (rank >= 1),
        "errors5": counted & (rank >= 5),
        "loss": loss,
    }
    # These terms are small; a plain sum of confidences would be large and lose digits.
    of_bin = {"bin_excess": jnp.where(counted, confidence - (rank < 1), 0)}
    new = {"seen": sums["seen"] + mask.sum(dtype=jnp.int32)}
    if "confusion" in sums:
        # A correct prediction counts as the label, even if it was another of several correct ones.
        predicted = jnp.where(rank < 1, label, logits.argmax(1))
        hits = counted.astype(jnp.int32)
        new["confusion"] = sums["confusion"].at[label, predicted].add(hits)
    for values, where in ((of_class, label), (of_bin, bins)):
        for name, value in values.items():
            of_batch = jnp.zeros_like(sums[name]).at[where].add(value.astype(sums[name].dtype))
            new[name] = sums[name] + of_batch
            if f"{name}_rest" in sums:
                new[f"{name}_rest"] = sums[f"{name}_rest"] + _lost(sums[name], of_batch)
    return new


def _lost(a: Array, b: Array) -> Array:
    """What `a + b` loses by rounding, exactly (Knuth, The Art of Computer Programming, 4.2.2)."""
    total = a + b
    part = total - a
    return (a - (total - part)) + (b - part)


def _rank(logits: Float[Array, "b classes"], label: Int[Array, " b"]) -> Int[Array, " b"]:
    """How many classes rank before the label; the last rank if a logit is not finite."""
    classes = logits.shape[-1]
    own = jnp.take_along_axis(logits, label[:, None], 1)
    before = jnp.arange(classes) < label[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(1, dtype=jnp.int32)
    return jnp.where(jnp.isfinite(logits).all(1), rank, max(classes, 5))


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
    """

    count: int
    error: float
    top5_error: float
    loss: float
    calibration_error: float
    class_counts: tuple[int, ...]
    class_errors: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None

    @property
    def errors(self) -> int:
        """Number of wrong first predictions."""
        return sum(self.class_errors)


def summarize(sums: Sums, expected: int, labelled: int | None) -> Result:
    """The metrics; checks that each example was seen once.

    Args:
      sums: of all batches.
      expected: number of examples of the split.
      labelled: how many of these have a label; None if unknown.

    Raises:
      RuntimeError: the number of examples seen is not `expected`, or of those counted `labelled`.
    """
    total = {name: np.asarray(value) for name, value in jax.device_get(sums).items()}
    for name in ("loss", "bin_excess"):
        total[name] = total[name].astype(np.float64) + total[f"{name}_rest"]
    seen, count = int(total["seen"]), int(total["count"].sum())
    if seen != expected:
        raise RuntimeError(f"evaluation counted {seen} examples of {expected}")
    if labelled is not None and count != labelled:
        raise RuntimeError(f"evaluation counted {count} labelled examples of {labelled}")
    if not count:
        raise UserError("no example of the split has a label; give a split with labels")
    return Result(
        count=count,
        error=int(total["errors"].sum()) / count,
        top5_error=int(total["errors5"].sum()) / count,
        loss=float(total["loss"].sum()) / count,
        calibration_error=float(np.abs(total["bin_excess"]).sum()) / count,
        class_counts=tuple(map(int, total["count"])),
        class_errors=tuple(map(int, total["errors"])),
        confusion=tuple(map(tuple, total["confusion"].tolist())) if "confusion" in total else None,
    )


def interval(errors: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of an error rate, of 95 % by default (Wilson 1927).

    It keeps its coverage for few errors too, unlike the normal interval `rate ± z * std`.
    """
    rate, share = errors / count, z**2 / count
    centre = (rate + share / 2) / (1 + share)
    reach = z / (1 + share) * math.sqrt(rate * (1 - rate) / count + share / (4 * count))
    # Rounding must not exclude the rate itself if it is 0 or 1.
    return max(0.0, min(rate, centre - reach)), min(1.0, max(rate, centre + reach))

"""Evaluation of a split: every example exactly once."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.train.steps import zero_sums


@dataclasses.dataclass(frozen=True)
class Result:
    """Means over a split: `loss` in nats and `error`, the top-1 error rate, between 0 and 1."""

    loss: float
    error: float
    count: int


def evaluate(
    eval_step: Callable[..., Any],
    variables: dict[str, Any],
    batches: Iterable[dict[str, Any]],
    mesh: Mesh,
    expected: int,
) -> Iterator[Result | None]:
    """Evaluates batch by batch, so that the caller can stop or show progress in between.

    Args:
      eval_step: compiled, see `steps.compile_steps`.
      variables: the network's parameters and running statistics.
      batches: padded and masked, see `pipeline.eval_batches`.
      mesh: of the devices.
      expected: number of examples of the split.

    Yields:
      None after each batch, and the result at the end.

    Raises:
      RuntimeError: other than `expected` examples were counted.
    """
    sums = jax.device_put(zero_sums(), sharding.replicated(mesh))
    for batch in batches:
        sums = eval_step(variables, sharding.put_batch(batch, mesh), sums)
        yield None
    total = jax.device_get(sums)
    count = int(total["count"])
    if count != expected:
        raise RuntimeError(f"evaluation counted {count} examples of {expected}")
    yield Result(float(total["loss"]) / count, float(total["errors"]) / count, count)

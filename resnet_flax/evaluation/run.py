"""Evaluation of a split: every example exactly once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.data.sources import Source
from resnet_flax.evaluation.metrics import Result, summarize, zero_sums


def evaluate(
    eval_step: Callable[..., Any],
    variables: dict[str, Any],
    batches: Iterable[dict[str, Any]],
    mesh: Mesh,
    source: Source,
    classes: int,
    *,
    confusion: bool = False,
) -> Iterator[Result | None]:
    """Evaluates batch by batch, so that the caller can stop or show progress in between.

    Args:
      eval_step: compiled, see `step.compile_eval`.
      variables: the network's parameters and running statistics.
      batches: padded and masked, see `pipeline.eval_batches`.
      mesh: of the devices.
      source: the examples that the batches are of.
      classes: number of the network's outputs.
      confusion: count the confusion matrix too.

    Yields:
      None after each batch, and the result at the end.

    Raises:
      RuntimeError: other examples were counted than `source` has.
    """
    dtype = jax.tree.leaves(variables)[0].dtype  # that of the logits
    sums = jax.device_put(zero_sums(classes, dtype, confusion=confusion), sharding.replicated(mesh))
    for batch in batches:
        sums = eval_step(variables, sharding.put_batch(batch, mesh), sums)
        yield None
    yield summarize(sums, len(source), getattr(source, "labelled", len(source)))

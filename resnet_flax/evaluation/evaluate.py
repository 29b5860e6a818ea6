"""Evaluation of a split: every example exactly once."""

from collections.abc import Callable, Iterable
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
    after_batch: Callable[[int], None] = lambda done: None,
) -> Result:
    """The metrics of a network on a split.

    Args:
      eval_step: compiled, see `step.compile_eval`.
      variables: the network's parameters and running statistics.
      batches: padded and masked, see `pipeline.eval_batches`.
      mesh: of the devices.
      source: the examples in the batches.
      classes: number of the network's outputs.
      confusion: also count the confusion matrix.
      after_batch: called with the number of finished batches, to show progress; an exception from
        it ends the evaluation.

    Raises:
      RuntimeError: the number of examples counted is not that of `source`.
    """
    dtype = jax.tree.leaves(variables)[0].dtype  # the logits' dtype
    sums = jax.device_put(zero_sums(classes, dtype, confusion=confusion), sharding.replicated(mesh))
    for done, batch in enumerate(batches, start=1):
        before, sums = sums, eval_step(variables, sharding.put_batch(batch, mesh), sums)
        # At most one batch is computed while one waits. More would fill a device's memory with
        # images, and on virtual devices of a busy CPU an all-reduce would wait until XLA aborts.
        jax.block_until_ready(before)
        after_batch(done)
    return summarize(sums, len(source), getattr(source, "labelled", len(source)))

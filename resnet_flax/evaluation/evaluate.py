"""Evaluation of a split: every example exactly once."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.data.sources import Source


@runtime_checkable
class Measures(Protocol):
    """What is measured on a split; `result.Metrics` is that of a classifier."""

    def zeros(self, dtype: Any) -> Any:
        """The states before the first batch; `dtype` is that of the parameters."""
        ...

    def result(self, states: Any, expected: int, labelled: int | None) -> Any:
        """The result of a split of `expected` examples, of which `labelled` have a label."""
        ...


def evaluate(
    measures: Measures,
    eval_step: Callable[..., Any],
    variables: dict[str, Any],
    batches: Iterable[dict[str, Any]],
    mesh: Mesh,
    source: Source,
    *,
    after_batch: Callable[[int], None] = lambda done: None,
) -> Any:
    """The result of a network on a split.

    Args:
      measures: what is measured.
      eval_step: compiled, see `step.compile_eval`.
      variables: the network's parameters and running statistics.
      batches: padded and masked, see `pipeline.eval_batches`.
      mesh: of the devices.
      source: the examples in the batches.
      after_batch: called with the number of finished batches, to show progress; an exception from
        it ends the evaluation.

    Raises:
      RuntimeError: the number of examples counted is not that of `source`.
    """
    dtype = jax.tree.leaves(variables)[0].dtype  # the logits' dtype
    states = jax.device_put(measures.zeros(dtype), sharding.replicated(mesh))
    for done, batch in enumerate(batches, start=1):
        before, states = states, eval_step(variables, sharding.put_batch(batch, mesh), states)
        # At most one batch is computed while one waits. More would fill a device's memory with
        # images, and on virtual devices of a busy CPU an all-reduce would wait until XLA aborts.
        jax.block_until_ready(before)
        after_batch(done)
    return measures.result(states, len(source), getattr(source, "labelled", len(source)))

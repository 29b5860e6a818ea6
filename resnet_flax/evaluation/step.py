"""One step of the evaluation of a classifier as a pure function, and as a program over a mesh."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array

from resnet_flax import sharding
from resnet_flax.evaluation.compile import jit
from resnet_flax.evaluation.result import Metrics, States
from resnet_flax.runtime.xla_options import Options

Batch = dict[str, Array]
Prepare = Callable[..., Any]


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    states: States,
    *,
    model: nn.Module,
    prepare: Prepare,
    metrics: Metrics,
) -> States:
    """Adds one batch to the states of metrics.

    Args:
      variables: the network's parameters and running statistics.
      batch: `image`, `label` and `mask`, as from `pipeline.eval_batches`; examples whose `mask` is
        false add nothing. May have `valid_labels`, `[b, classes]`.
      states: of the previous batches, at first `metrics.zeros()`.
      model: the network.
      prepare: `(images) -> x`, normalization on the device.
      metrics: what is measured.
    """
    logits: Any = model.apply(variables, prepare(batch["image"]), train=False)
    return metrics.add(states, logits, batch["label"], batch["mask"], batch.get("valid_labels"))


def compile_eval(
    mesh: Mesh,
    variable_shardings: Any,
    evaluate: Callable[..., Any],
    options: Options | None = None,
) -> Callable[..., States]:
    """A step of evaluation (its keywords bound) as a program over the mesh."""
    replicated, sharded = sharding.replicated(mesh), sharding.over_batch(mesh)
    inputs = (variable_shardings, sharded, replicated)
    return jit(evaluate, options, in_shardings=inputs, out_shardings=replicated)

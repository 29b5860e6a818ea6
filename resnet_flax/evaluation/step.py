"""One step of evaluation as a pure function, and as a program over a mesh."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array

from resnet_flax import sharding
from resnet_flax.evaluation.compile import jit
from resnet_flax.evaluation.metrics import add
from resnet_flax.runtime.xla_options import Options

Batch = dict[str, Array]
Sums = dict[str, Array]
Prepare = Callable[..., Any]


def eval_step(
    variables: dict[str, Any], batch: Batch, sums: Sums, *, model: nn.Module, prepare: Prepare
) -> Sums:
    """Adds one batch to `sums`, see `metrics.add`.

    Args:
      variables: the network's parameters and running statistics.
      batch: as for `train_step`; examples whose `mask` is false add nothing. May have
        `valid_labels`, `[b, classes]`.
      sums: of the previous batches, at first `metrics.zero_sums(classes)`.
      model: the network.
      prepare: `(images) -> x`, normalisation on the device.
    """
    logits: Any = model.apply(variables, prepare(batch["image"]), train=False)
    return add(sums, logits, batch["label"], batch["mask"], batch.get("valid_labels"))


def compile_eval(
    mesh: Mesh,
    variable_shardings: Any,
    evaluate: Callable[..., Any],
    options: Options | None = None,
) -> Callable[..., Sums]:
    """`eval_step` (its keywords bound) as a program over the mesh."""
    replicated, sharded = sharding.replicated(mesh), sharding.over_batch(mesh)
    inputs = (variable_shardings, sharded, replicated)
    return jit(evaluate, options, in_shardings=inputs, out_shardings=replicated)

"""Evaluation of a network with weights on a data set, as `resnet-flax eval` does it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from resnet_flax import sharding
from resnet_flax.data.pipeline import eval_batches
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.metrics import Result, interval
from resnet_flax.evaluation.run import evaluate
from resnet_flax.train.steps import compile_eval, eval_step

# Views of an image that predictions are averaged over.
PROTOCOLS = ("center",)


def evaluate_pretrained(
    model: Any,
    variables: dict[str, Any],
    preprocessing: Preprocessing,
    source: Source,
    *,
    batch_size: int,
    workers: int = 0,
    devices: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """The metrics of a network on a split, one centred view of each image.

    Args:
      model: the network.
      variables: its parameters and running statistics.
      preprocessing: of the images.
      source: examples; labels are outputs of the network, see `labels.as_outputs`.
      batch_size: rounded up to a multiple of the devices; of no influence on the result.
      workers: reader processes; 0 reads in threads of this one.
      devices: to compute on; all by default.
      progress: called with the batches that are done, and their number.
    """
    preprocessing.check(preprocessing.transform(source[0]["image"]).shape)
    mesh = sharding.make_mesh(devices=devices)
    size = -(-batch_size // mesh.size) * mesh.size
    whole = sharding.replicated(mesh)
    variables = jax.device_put(variables, whole)
    prepare = partial(preprocessing.normalize, dtype=model.dtype)
    step = compile_eval(mesh, whole, partial(eval_step, model=model, prepare=prepare))
    total = -(-len(source) // size)
    with eval_batches(
        source,
        batch_size=size,
        transform=preprocessing.transform,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=workers,
    ) as batches:
        found = evaluate(step, variables, batches, mesh, source, model.num_classes)
        for done, result in enumerate(found, start=1):
            if result is None:
                progress(done, total)
    assert result is not None
    if not result.loss < float("inf"):
        raise UserError(
            f"the network's loss is {result.loss}: its weights are damaged, or for images that are "
            "normalised otherwise"
        )
    return result


def report(result: Result, class_names: tuple[str, ...]) -> dict[str, Any]:
    """A result as JSON: rates between 0 and 1, each with its 95 % interval."""

    def rate(errors: int, count: int) -> dict[str, Any]:
        low, high = interval(errors, count)
        return {"errors": errors, "count": count, "rate": errors / count, "interval": [low, high]}

    classes = zip(result.class_counts, result.class_errors, strict=True)
    return {
        "count": result.count,
        "top1_error": rate(result.errors, result.count),
        "top5_error": rate(round(result.top5_error * result.count), result.count),
        "negative_log_likelihood": result.loss,
        "calibration_error": result.calibration_error,
        "classes": {
            class_names[i] if class_names else str(i): rate(errors, count)
            for i, (count, errors) in enumerate(classes)
            if count
        },
    }

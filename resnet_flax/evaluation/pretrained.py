"""Evaluation of a network with weights on a data set, used by `resnet-flax eval`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from resnet_flax import sharding
from resnet_flax.data.parts import complete_batches, unread
from resnet_flax.data.pipeline import Ignored, blank_batch, eval_batches, shapes_of
from resnet_flax.data.pixels import CHOICES, sentences
from resnet_flax.data.sources import Source, check_source
from resnet_flax.data.sources.parts import example_of
from resnet_flax.errors import UserError
from resnet_flax.evaluation.evaluate import evaluate
from resnet_flax.evaluation.labels import check_head
from resnet_flax.evaluation.metrics import METRICS
from resnet_flax.evaluation.multi_view import (
    Network,
    Predictions,
    View,
    average,
    make_views,
    measure,
    predict,
)
from resnet_flax.evaluation.result import Metrics, Result, interval
from resnet_flax.evaluation.step import compile_eval, eval_step
from resnet_flax.keys import chosen
from resnet_flax.runtime import distributed, xla_options
from resnet_flax.runtime.terminal import say


def evaluate_pretrained(
    networks: Sequence[Network],
    source: Source,
    *,
    protocol: str = "center",
    scales: Sequence[int] = (),
    exact: bool = False,
    confusion: bool = False,
    more: Sequence[str] = (),
    batch_size: int,
    workers: int = 0,
    devices: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = say,
    flags: str = "",
) -> Result:
    """The metrics of a network on a split, or of several whose probabilities are averaged.

    Args:
      networks: one, or an ensemble.
      source: examples; labels are outputs of the networks, see `labels.as_outputs`.
      protocol: a key of `PROTOCOLS`.
      scales: see `multi_view.make_views`.
      exact: see `multi_view.make_views`.
      confusion: count the confusion matrix too.
      more: names of further metrics in `METRICS`.
      batch_size: rounded up to a multiple of the devices; does not affect the result.
      workers: reader processes; 0 reads in threads of this one.
      devices: to compute on; all by default.
      progress: called with the number of finished views of images, and of all.
      warn: called in the first process, once for what of images is ignored, see `Pixels.ignored`.
      flags: what precedes the name of a field of the preprocessing in messages, such as '--'.
    """
    image = check_source(source, "the data")[0]["image"]
    for model, variables, preprocessing in networks:
        check_head(model.num_classes)
        shape = preprocessing.transform(image).shape
        check_channels(variables, shape[-1], "the network", f"{flags}channels=")
        preprocessing.check(shape)
    ignored = [Ignored(network.preprocessing.pixels) for network in networks]
    metrics = Metrics(
        networks[0].model.num_classes,
        confusion=confusion,
        more={name: chosen("--metrics", METRICS, name) for name in more},
    )
    settings = {"batch_size": batch_size, "workers": workers, "devices": devices}
    if protocol == "center" and len(networks) == 1:
        result = _in_the_middle(networks[0], source, metrics, progress, ignored[0], **settings)
    else:
        views = []
        for network in networks:
            shape = network.preprocessing.transform(image).shape
            views.append(make_views(protocol, network, shape, scales, exact))
        found = _over_views(networks, source, views, progress, ignored, **settings)
        result = measure(average(found), source, metrics)
    if not result.loss < float("inf"):
        raise UserError(
            f"the network's loss is {result.loss}: its weights are damaged, or for images with "
            "another normalisation"
        )
    if distributed.is_primary():
        most = np.max([one.counts for one in ignored], axis=0)
        for sentence in sentences(most, f"of {len(source):,}", flags):
            warn(sentence)
    return result


def check_channels(variables: Mapping[str, Any], channels: int, what: str, key: str) -> None:
    """Raises UserError if a network's weights are for images of other channels.

    Args:
      variables: of the network.
      channels: of the images.
      what: has the weights, for the error.
      key: what converts the images: '--channels=' or 'data.channels='.
    """
    wanted = variables["params"]["stem"]["conv1"]["kernel"].shape[2]
    if wanted != channels:
        known = f"; convert them by {key}{wanted}" if wanted in CHOICES["channels"] else ""
        raise UserError(
            f"{what} takes images of {wanted} channel{'s' * (wanted > 1)}, but the images have "
            f"{channels}{known}"
        )


def _over_views(
    networks: Sequence[Network],
    source: Source,
    views: Sequence[Sequence[View]],
    progress: Callable[[int, int], None],
    ignored: Sequence[Ignored],
    **settings: Any,
) -> list[Predictions]:
    """The predictions of each network, averaged over its views."""
    done, total = 0, len(source) * sum(map(len, views))

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    return [
        predict(network, source, its_views, progress=count, ignored=its_own, **settings)
        for network, its_views, its_own in zip(networks, views, ignored, strict=True)
    ]


def _in_the_middle(
    network: Network,
    source: Source,
    metrics: Metrics,
    progress: Callable[[int, int], None],
    ignored: Ignored,
    *,
    batch_size: int,
    workers: int,
    devices: Any,
) -> Result:
    """One network on one view of each image, as in training; predictions stay on the device."""
    model, variables, preprocessing = network
    mesh = sharding.make_mesh(devices=devices)
    size = -(-batch_size // mesh.size) * mesh.size
    replicated = sharding.replicated(mesh)
    prepare = partial(preprocessing.normalize, dtype=model.dtype)
    example = example_of(source, 0)
    image = preprocessing.transform(example["image"])
    blank = blank_batch(shapes_of(example, image), size // jax.process_count())
    platform = mesh.devices.flat[0].platform
    options = xla_options.options(platform, image.shape, model.dtype, training=False)
    one_step = partial(eval_step, model=model, prepare=prepare, metrics=metrics)
    step = compile_eval(mesh, replicated, one_step, options)
    with eval_batches(
        source,
        batch_size=size,
        transform=preprocessing.transform,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=workers,
        ignored=ignored,
    ) as batches:
        result: Result = evaluate(
            metrics,
            step,
            sharding.put_shared(variables, replicated),
            complete_batches(
                batches,
                -(-len(source) // size),
                lambda _: blank,
                partial(unread, "the evaluation"),
            ),
            mesh,
            source,
            after_batch=lambda done: progress(min(done * size, len(source)), len(source)),
        )
    ignored.counts = distributed.all_sum(ignored.counts)  # each process read its own part
    return result


def report(result: Result, class_names: tuple[str, ...]) -> dict[str, Any]:
    """A result as JSON: rates between 0 and 1, each with its 95 % interval."""

    def rate(errors: int, count: int) -> dict[str, Any]:
        low, high = interval(errors, count)
        return {"errors": errors, "count": count, "rate": errors / count, "interval": [low, high]}

    classes = zip(result.class_counts, result.class_errors, strict=True)
    given = class_names or [str(i) for i in range(len(result.class_counts))]
    several = Counter(given)
    # Two classes of one name, as the two cranes of ImageNet, each have a rate.
    names = [f"{one} ({i})" if several[one] > 1 else one for i, one in enumerate(given)]
    return {
        "count": result.count,
        "top1_error": rate(result.errors, result.count),
        "top5_error": rate(round(result.top5_error * result.count), result.count),
        "negative_log_likelihood": result.loss,
        "calibration_error": result.calibration_error,
        **({"metrics": dict(result.more)} if result.more else {}),
        "classes": {
            names[i]: rate(errors, count) for i, (count, errors) in enumerate(classes) if count
        },
    }

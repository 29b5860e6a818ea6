"""Predictions averaged over views of an image."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from resnet_flax import renamed, sharding
from resnet_flax.data.pipeline import Ignored, eval_examples
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import Source
from resnet_flax.data.transforms import ScaleTransform, TenCropTransform
from resnet_flax.errors import SettingError, UserError
from resnet_flax.evaluation.compile import jit
from resnet_flax.evaluation.result import Metrics, Result
from resnet_flax.runtime import xla_options

PROTOCOLS = {
    "center": "one view, in the center",
    "ten_crop": "center and four corners with their flips",
    "multiscale": "fully convolutional over several scales, with flips",
}

# Shorter sides for a network of 224 pixels (He et al. 2015, section 3.4).
SCALES = (224, 256, 384, 480, 640)

CHUNK = 1000  # predictions measured in one call


class Network(NamedTuple):
    """A network with weights and its preprocessing.

    Attributes:
      model: the network.
      variables: its parameters and running statistics.
      preprocessing: of its images.
    """

    model: Any
    variables: dict[str, Any]
    preprocessing: Preprocessing


class View(NamedTuple):
    """One view of every image: a crop or a scale, and whether it is also flipped.

    Attributes:
      transform: of an image on the host, to `[h, w, c]` or to several crops `[v, h, w, c]`.
      preprocessing: its normalisation follows on the device.
      flip: use the mirror image of every view as well.
      pool_window: see `ResNet.__call__`.
    """

    transform: Callable[[Any], np.ndarray]
    preprocessing: Preprocessing
    flip: bool
    pool_window: int


def make_views(
    protocol: str,
    network: Network,
    image_shape: tuple[int, ...],
    scales: Sequence[int] = (),
    exact: bool = False,
) -> list[View]:
    """The views of a protocol, all with the same weight.

    Args:
      protocol: a key of `PROTOCOLS`.
      network: to evaluate.
      image_shape: `[h, w, c]` of a training image.
      scales: shorter sides of 'multiscale'; by default `SCALES` in proportion to the training
        image's side, rounded to the network's stride.
      exact: do not crop longer sides to a multiple of the stride (see `ScaleTransform`); a program
        is then compiled for every image shape.

    Raises:
      UserError: the protocol does not apply to the network, or the scales are too small.
    """
    model, _, preprocessing = network
    if protocol == "center":
        return [View(preprocessing.transform, preprocessing, flip=False, pool_window=0)]
    side, how, pixels = min(image_shape[:2]), preprocessing.interpolation, preprocessing.pixels
    if protocol == "ten_crop":
        shorter = preprocessing.transform.shorter
        if not preprocessing.size or shorter == preprocessing.size:
            raise SettingError(
                "ten_crop needs images that are larger than the crops, but this network's are "
                "not cropped;",
                "data.crop_fraction",
                "give data.size and a data.crop_fraction below 1",
            )
        ten = TenCropTransform(preprocessing.size, shorter, how, pixels)
        return [View(ten, preprocessing, flip=True, pool_window=0)]
    pool_window = _last_side(network, image_shape)
    chosen = scales or scales_of(network, image_shape)
    if min(chosen) < side:
        raise UserError(
            f"the scale {min(chosen)} is less than the side {side} that the network was trained "
            "for; give larger --scales"
        )
    everywhere, multiple = _without_place(preprocessing), 0 if exact else model.stride
    scaled = partial(ScaleTransform, multiple=multiple, interpolation=how, pixels=pixels)
    return [View(scaled(scale), everywhere, True, pool_window) for scale in dict.fromkeys(chosen)]


def scales_of(network: Network, image_shape: tuple[int, ...]) -> list[int]:
    """The shorter sides of 'multiscale' where none are given, see `make_views`."""
    side, stride = min(image_shape[:2]), network.model.stride
    return [max(side, round(side * scale / SCALES[0] / stride) * stride) for scale in SCALES]


def _last_side(network: Network, image_shape: tuple[int, ...]) -> int:
    """The side of the last feature map for a training image."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    maps = jax.eval_shape(
        partial(network.model.apply, train=False, return_features=True), network.variables, images
    )
    last = list(maps)[-3]  # before pooled and logits
    return int(min(maps[last].shape[1:3]))


def _without_place(preprocessing: Preprocessing) -> Preprocessing:
    """Replaces the mean image, which has a fixed size, by its mean over positions."""
    if not len(preprocessing.pixel_mean):
        return preprocessing
    channels = np.array(preprocessing.pixel_mean, np.float64).mean((0, 1)) / 255
    mean = channels + np.broadcast_to(preprocessing.mean, channels.shape)
    return dataclasses.replace(preprocessing, mean=tuple(mean.tolist()), pixel_mean=())


def log_probabilities(
    variables: dict[str, Any],
    images: UInt8[Array, "b *v h w c"],
    *,
    model: Any,
    prepare: Callable[[Array], Array],
    flip: bool,
    pool_window: int,
) -> Float[Array, "b classes"]:
    """The logarithm of the mean of the softmax over all views and positions.

    Args:
      variables: the network's.
      images: one or several views of each example.
      model: the network.
      prepare: normalisation.
      flip: see `View`.
      pool_window: see `View`.
    """
    b = len(images)
    crops = images if images.ndim == 5 else images[:, None]
    if flip:
        crops = jnp.concatenate([crops, crops[..., ::-1, :]], 1)
    x = prepare(crops.reshape(-1, *crops.shape[2:]))
    logits = model.apply(variables, x, train=False, pool_window=pool_window)
    log_p = jax.nn.log_softmax(logits).reshape(b, -1, logits.shape[-1])
    # Averaged in logarithms, as a probability may be too small for a float.
    return jax.nn.logsumexp(log_p, axis=1) - jnp.log(log_p.shape[1]).astype(log_p.dtype)


class Predictions(NamedTuple):
    """Predictions for every example of a source, in its order.

    Attributes:
      log_p: logarithms of the probabilities, `[n, classes]`.
      label: `[n]`.
      valid_labels: see `metrics.add`; None if examples have one label.
    """

    log_p: np.ndarray
    label: np.ndarray
    valid_labels: np.ndarray | None


def predict(
    network: Network,
    source: Source,
    views: Sequence[View],
    *,
    batch_size: int,
    workers: int = 0,
    devices: Any = None,
    progress: Callable[[int], None] = lambda images: None,
    ignored: Ignored | None = None,
) -> Predictions:
    """Predictions averaged over views.

    Args:
      network: to evaluate.
      source: n examples.
      views: see `make_views`.
      batch_size: number of images of the training size; correspondingly fewer if they are larger or
        have several views.
      workers: reader processes; 0 reads in threads of this one.
      devices: to compute on; all by default.
      progress: called with the number of images in each batch.
      ignored: counts the examples of which something is ignored.
    """
    mesh = sharding.make_mesh(devices=devices)
    replicated = sharding.replicated(mesh)
    over_batch = sharding.over_batch(mesh)
    variables = sharding.put_shared(network.variables, replicated)
    shape = network.preprocessing.transform(source[0]["image"]).shape
    pixels = batch_size * _area(shape)
    platform = mesh.devices.flat[0].platform
    options = xla_options.options(platform, shape, network.model.dtype, training=False)
    kind = jax.tree.leaves(network.variables)[0].dtype
    log_p = np.full((len(source), network.model.num_classes), -np.inf, kind)
    label = np.zeros(len(source), np.int32)
    valid_labels = (
        np.zeros(log_p.shape, bool) if "valid_labels" in renamed.example(source[0]) else None
    )
    for view in views:
        score = jit(
            partial(
                log_probabilities,
                model=network.model,
                prepare=partial(view.preprocessing.normalize, dtype=network.model.dtype),
                flip=view.flip,
                pool_window=view.pool_window,
            ),
            options,
            in_shardings=(replicated, over_batch),
            out_shardings=replicated,
        )
        with eval_examples(source, view.transform, workers, ignored) as examples:
            for images, group in _alike(examples, pixels, mesh.size):
                at = [example["index"] for example in group]
                batch = sharding.put_shared(images, over_batch)
                found = jax.device_get(score(variables, batch))[: len(group)]
                log_p[at] = np.logaddexp(log_p[at], found)
                label[at] = [example["label"] for example in group]
                if valid_labels is not None:
                    valid_labels[at] = [example["valid_labels"] for example in group]
                progress(len(group))
        ignored = None  # every view is of the same images
    return Predictions(log_p - np.log(len(views)).astype(kind), label, valid_labels)


def _area(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _alike(
    examples: Iterator[dict[str, Any]], pixels: int, multiple: int
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Batches of images of one shape, padded to one batch size per shape, and their examples."""
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def size(shape: tuple[int, ...]) -> int:
        return max(1, pixels // _area(shape) // multiple) * multiple

    def batch(shape: tuple[int, ...]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        group = waiting.pop(shape)
        images = [example.pop("image") for example in group]
        return np.stack(images + images[:1] * (size(shape) - len(images))), group

    for example in examples:
        shape = example["image"].shape
        waiting.setdefault(shape, []).append(example)
        if len(waiting[shape]) == size(shape):
            yield batch(shape)
    for shape in list(waiting):
        yield batch(shape)


def average(predictions: Sequence[Predictions]) -> Predictions:
    """The mean of several networks' probabilities on the same examples."""
    log_p = reduce(np.logaddexp, [one.log_p for one in predictions])
    return predictions[0]._replace(log_p=log_p - np.log(len(predictions)).astype(log_p.dtype))


def measure(predictions: Predictions, source: Source, metrics: Metrics | None = None) -> Result:
    """The metrics of predictions.

    Args:
      predictions: of all examples of `source`.
      source: for their number.
      metrics: what is measured; by default what a classifier always has.
    """
    n, classes = predictions.log_p.shape
    metrics = metrics or Metrics(classes)
    states = metrics.zeros(predictions.log_p.dtype)
    add_part = jax.jit(metrics.add)
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        log_p, label = jax.device_put((predictions.log_p[part], predictions.label[part]))
        several = predictions.valid_labels
        valid_labels = None if several is None else jax.device_put(several[part])
        mask = jax.device_put(np.ones(label.shape, bool))
        states = add_part(states, log_p, label, mask, valid_labels)
    return metrics.result(states, n, getattr(source, "labelled", n))

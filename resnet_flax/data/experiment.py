"""From a config's `data` to splits, host transforms and device augmentation."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from resnet_flax.data import augment
from resnet_flax.data.pixels import CHOICES
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import SOURCES, Source, hold_out, open_source, without_auto
from resnet_flax.data.sources.folder import FolderSource
from resnet_flax.data.transforms import EvalTransform, TrainTransform


def open_split(
    data: ml_collections.ConfigDict, source: str, split: str, class_names: tuple[str, ...] = ()
) -> Source:
    """Opens a split of a data set, with the options that the config's `data` has for its store."""
    entry = SOURCES.get(source.partition(":")[0])
    options = {key.rpartition(".")[2]: key for key in (entry.keys if entry else ())}
    values = {name: data[key.removeprefix("data.")] for name, key in options.items()}
    return open_source(source, split, class_names=class_names, **values)


def in_order_of(source: Source, class_names: Sequence[str]) -> Source:
    """The source; a folder that has these classes in another order is labeled by this one."""
    return source.in_order_of(class_names) if isinstance(source, FolderSource) else source


def open_splits(
    data: ml_collections.ConfigDict, class_names: Sequence[str] = ()
) -> tuple[Source, Source]:
    """The training and the evaluation split of a config's `data`; see `in_order_of`."""
    train_source = in_order_of(open_split(data, data.source, data.train_split), class_names)
    held_out: Source | None = None
    if data.holdout:
        train_source, held_out = hold_out(train_source, data.holdout)
    if data.eval_split == "holdout" and held_out is not None:
        eval_source = held_out
    else:
        eval_source = open_split(data, data.source, data.eval_split, train_source.class_names)
    return train_source, eval_source


def make_preprocessing(
    data: ml_collections.ConfigDict, pixel_mean: np.ndarray | None = None
) -> Preprocessing:
    """The preprocessing of an evaluation, by the config's `data`; it is saved in checkpoints.

    Args:
      data: the config's.
      pixel_mean: the mean training image, see `mean_image.pixel_mean`, where `data.pixel_mean`.
    """
    # In float64, so that JSON has the two decimals that it is rounded to and no more.
    levels = [] if pixel_mean is None else pixel_mean.astype(float).round(2).tolist()
    return Preprocessing(
        data.eval_size or data.size,
        data.crop_fraction,
        data.interpolation,
        tuple(data.mean),
        tuple(data.std),
        tuple(levels),
        **without_auto(data.source, {name: data[name] for name in CHOICES}),
    )


def make_transforms(
    data: ml_collections.ConfigDict,
) -> tuple[TrainTransform, EvalTransform]:
    """The transforms on the host for training and evaluation, by the config's `data`."""
    train = TrainTransform(
        data.crop,
        (*data.early_sizes, data.size),
        data.early_steps,
        data.jitter,
        data.crop_area,
        data.crop_ratio,
        data.policy,
        data.policy_operations,
        data.policy_magnitude,
        data.interpolation,
        make_preprocessing(data).pixels,
    )
    return train, make_preprocessing(data).transform


def augment_and_normalize(
    images: UInt8[Array, "b h w c"],
    labels: Int[Array, " b"],
    step: Int[Array, ""],
    *,
    data: ml_collections.ConfigDict,
    preprocessing: Preprocessing,
    seed: Any,
    classes: int,
    dtype: Any,
) -> tuple[Float[Array, "b h w c"], Array]:
    """The augmentation and normalisation on the device, by the config's `data`.

    Args:
      images: a global batch.
      labels: of the images.
      step: number of the batch.
      data: the config's.
      preprocessing: its normalisation applies to training too.
      seed: of the augmentation, an int or an array of one.
      classes: number of classes.
      dtype: of the result.

    Returns:
      The network's input, and targets as `losses.cross_entropy` takes them.
    """
    levels = preprocessing.subtract_mean_image(images)
    levels = augment.crop_and_flip(levels, step, seed=seed, pad=data.pad, flip=data.flip)
    x, targets = preprocessing.standardize(levels, dtype), labels
    if data.pca_lighting:
        alpha_std = data.pca_lighting
        x = augment.pca_lighting(x, step, seed=seed, alpha_std=alpha_std, std=data.std)
    if data.erase:
        x = augment.erase(x, step, seed=seed, probability=data.erase)
    if data.mixup or data.cutmix:
        targets = jax.nn.one_hot(labels, classes)
        x, targets = augment.mix(
            x,
            targets,
            step,
            seed=seed,
            mixup=data.mixup,
            cutmix=data.cutmix,
            distance=data.repeats,
        )
    return x, targets

"""What a config's `data` says, made: splits, transforms of the host, preparation on the device."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array

from resnet_flax.data import augment
from resnet_flax.data.sources import Source, hold_out, open_source
from resnet_flax.data.transforms import EvalTransform, TrainTransform


def open_splits(data: ml_collections.ConfigDict) -> tuple[Source, Source]:
    """What is trained on and what is evaluated on, by the config's `data`."""
    train_source = open_source(data.source, data.train_split, data.data_dir)
    held_out: Source | None = None
    if data.holdout:
        train_source, held_out = hold_out(train_source, data.holdout)
    if data.eval_split == "holdout" and held_out is not None:
        eval_source = held_out
    else:
        eval_source = open_source(
            data.source, data.eval_split, data.data_dir, train_source.class_names
        )
    return train_source, eval_source


def make_transforms(
    data: ml_collections.ConfigDict,
) -> tuple[TrainTransform, EvalTransform]:
    """What the host does to images, by the config's `data`."""
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
    )
    size = data.eval_size or data.size
    return train, EvalTransform(size, data.crop_fraction, data.interpolation)


class Prepare:
    """What the device does to images, by the config's `data`.

    Args:
      data: the config's.
      seed: of all that is random.
      classes: number of them.
      dtype: of the images that networks get.
      pixel_mean: `[h, w, c]` grey levels, or None.
    """

    def __init__(
        self,
        data: ml_collections.ConfigDict,
        seed: int,
        classes: int,
        dtype: Any,
        pixel_mean: np.ndarray | None,
    ) -> None:
        self._data, self._seed, self._classes, self._dtype = data, seed, classes, dtype
        self._pixel_mean = pixel_mean

    def training(self, images: Array, labels: Array, step: Array) -> tuple[Array, Array]:
        """Augmented, normalised images, and targets as `losses.cross_entropy` takes them."""
        data, seed = self._data, self._seed
        images = self._less_mean(images)
        images = augment.crop_and_flip(images, step, seed=seed, pad=data.pad, flip=data.flip)
        x, targets = self._normalized(images), labels
        if data.pca_lighting:
            alpha_std = data.pca_lighting
            x = augment.pca_lighting(x, step, seed=seed, alpha_std=alpha_std, std=data.std)
        if data.erase:
            x = augment.erase(x, step, seed=seed, probability=data.erase)
        if data.mixup or data.cutmix:
            targets = jax.nn.one_hot(labels, self._classes)
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

    def evaluation(self, images: Array) -> Array:
        """Normalised images."""
        return self._normalized(self._less_mean(images))

    def _less_mean(self, images: Array) -> Array:
        if self._pixel_mean is None:
            return images
        return augment.less_pixel_mean(images, jnp.asarray(self._pixel_mean))

    def _normalized(self, images: Array) -> Array:
        return augment.normalize(images, self._data.mean, self._data.std, self._dtype)

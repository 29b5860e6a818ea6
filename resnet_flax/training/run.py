"""From a config to a run: its data and programs, for the loop."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import ml_collections

from resnet_flax import sharding
from resnet_flax.config import flatten
from resnet_flax.data import fingerprint, mean_image
from resnet_flax.data.check import check_examples
from resnet_flax.data.experiment import make_preprocessing, make_transforms, open_splits
from resnet_flax.data.pipeline import Batch, eval_batches, train_batches
from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source, in_memory
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError
from resnet_flax.models import ResNet
from resnet_flax.training.programs import Programs, check_batches, compile_programs


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop needs from a config.

    Attributes:
      config: resolved.
      mesh: of the devices.
      train_source: examples to train on, one `ArraySource` where `data.resident`.
      eval_source: examples to evaluate on.
      train_transform: of an image, on the host.
      eval_transform: of an image, on the host.
      programs: on the devices.
      about: metadata that checkpoints have besides the state.
      files: names and sizes of a folder's images, for "train" and "eval".
      notes: to print about the config.
      patience: how long to wait for data.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    train_source: Source
    eval_source: Source
    train_transform: TrainTransform
    eval_transform: EvalTransform
    programs: Programs
    about: dict[str, Any]
    files: dict[str, fingerprint.Files]
    notes: list[str]
    patience: Patience

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.about["class_names"])

    @property
    def eval_batch_size(self) -> int:
        """The global batch size of an evaluation."""
        return int(self.config.data.eval_batch_size or self.config.batch_size)

    def train_batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """This process's parts of the training batches from number `start`, endlessly."""
        return train_batches(
            self.train_source,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            transform=self.train_transform,
            repeats=self.config.data.repeats,
            start=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=self.config.data.workers,
            patience=self.patience,
        )

    def eval_batches(self) -> AbstractContextManager[Iterator[Batch]]:
        """This process's parts of the batches that contain every evaluation example once."""
        return eval_batches(
            self.eval_source,
            batch_size=self.eval_batch_size,
            transform=self.eval_transform,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=self.config.data.workers,
            patience=self.patience,
        )


def build(config: ml_collections.ConfigDict, patience: Patience = PATIENT) -> Run:
    """Opens the data; compiles nothing yet.

    Args:
      config: resolved.
      patience: see `readers.reading`.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batches(config, mesh.size)
    data = config.data
    opened = dict(zip(("train", "eval"), open_splits(data), strict=True))
    if not len(opened["train"]):
        raise UserError(f"the split {data.train_split!r} of {data.source} has no examples")
    train_transform, eval_transform = make_transforms(data)
    with reading(opened["train"], 0, patience) as examples:
        image_shape = eval_transform(next(examples)["image"]).shape
    _check_channels(config, image_shape[-1])
    _check_evaluation(config, opened["eval"], eval_transform, image_shape, patience)
    train_source, eval_source = opened["train"], opened["eval"]
    if data.in_memory or data.resident:
        train_source = in_memory(train_source, patience)
        eval_source = in_memory(eval_source, patience)
    if data.resident and config.batch_size > len(train_source):
        raise UserError(
            f"batch_size={config.batch_size} is more than the {len(train_source)} training examples"
        )
    pixel_mean = None
    if data.pixel_mean:
        sample = len(train_source) if data.resident or data.in_memory else mean_image.SAMPLE
        pixel_mean = mean_image.pixel_mean(train_source, eval_transform, sample, patience)
    classes = len(train_source.class_names)
    preprocessing = make_preprocessing(data, pixel_mean)
    programs = compile_programs(config, mesh, classes, image_shape, preprocessing)
    about = {
        "config": flatten(config),
        "class_names": list(train_source.class_names),
        "data": {name: fingerprint.take(source) for name, source in opened.items()},
        "preprocessing": preprocessing.to_json(),
    }
    return Run(
        config,
        mesh,
        train_source,
        eval_source,
        train_transform,
        eval_transform,
        programs,
        about,
        {name: fingerprint.listing(source) for name, source in opened.items()},
        _notes(config, programs.model),
        patience,
    )


def _notes(config: ml_collections.ConfigDict, model: ResNet) -> list[str]:
    if (
        config.accumulation > 1
        and model.norm == "batch"
        and not config.model.bn_group_size.isdecimal()
    ):
        part = config.batch_size // config.accumulation
        return [
            f"warning: with accumulation={config.accumulation} batch normalisation averages over "
            f"each microbatch of {part} examples, not over the batch of {config.batch_size}; "
            f"model.bn_group_size={part} or a divisor does the same with any accumulation"
        ]
    return []


def _check_evaluation(
    config: ml_collections.ConfigDict,
    source: Source,
    transform: EvalTransform,
    image_shape: tuple[int, ...],
    patience: Patience,
) -> None:
    """Raises UserError if an evaluation, which may be hours from now, would fail."""
    split = config.data.eval_split
    shape = check_examples(source, transform, split, patience)
    whole = 3 if config.data.pixel_mean else 1
    if shape[-whole:] != image_shape[-whole:]:
        raise UserError(
            f"the images of the split {split!r} have shape {list(shape)} (height, width, "
            f"channels), those of {config.data.train_split!r} {list(image_shape)}; give a split "
            "that fits"
        )


def _check_channels(config: ml_collections.ConfigDict, channels: int) -> None:
    for name in ("mean", "std"):
        given = len(config.data[name])
        if given not in (1, channels):
            raise UserError(
                f"data.{name} has {given} numbers, but the images of {config.data.source} have "
                f"{channels} channel{'s' * (channels > 1)}; give one number or one per channel"
            )
    if config.data.pca_lighting and channels != 3:
        raise UserError(
            f"data.pca_lighting shifts RGB, but the images of {config.data.source} have {channels} "
            f"channel{'s' * (channels > 1)}; set it to 0"
        )

"""The data of an experiment, checked before anything is trained on it."""

from typing import Any, NamedTuple

import ml_collections

from resnet_flax.data import fingerprint, mean_image
from resnet_flax.data.check import check_examples
from resnet_flax.data.experiment import make_preprocessing, make_transforms
from resnet_flax.data.in_memory import in_memory
from resnet_flax.data.pipeline import Ignored, Shapes, shapes_of
from resnet_flax.data.pixels import sentences, to_array
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.readers import Patience, reading
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.folder import note_left_out
from resnet_flax.data.sources.parts import check_example, label_of, whole
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError


class Data(NamedTuple):
    """The data of an experiment.

    Attributes:
      train: examples to train on.
      eval: examples to evaluate on.
      train_transform: of an image, on the host.
      eval_transform: of an image, on the host.
      image_shape: `(height, width, channels)` of a transformed image of an evaluation.
      preprocessing: of an evaluation, which checkpoints have.
      fingerprints: see `fingerprint.take`, of "train" and "eval".
      files: names and sizes of a folder's images, of "train" and "eval".
      shapes: of an example of "train", before its transform, and of "eval", after it.
      notes: to print about the images.
    """

    train: Source
    eval: Source
    train_transform: TrainTransform
    eval_transform: EvalTransform
    image_shape: tuple[int, ...]
    preprocessing: Preprocessing
    fingerprints: dict[str, Any]
    files: dict[str, fingerprint.Files]
    shapes: dict[str, Shapes]
    notes: list[str]


def open_data(
    config: ml_collections.ConfigDict, patience: Patience, splits: tuple[Source, Source]
) -> Data:
    """Checks that a training and its evaluations can use the splits, and prepares them.

    Args:
      config: checked.
      patience: see `readers.reading`.
      splits: for training and evaluation.

    Raises:
      UserError: they do not fit the config or each other, or an image cannot be read.
    """
    data = config.data
    opened = dict(zip(("train", "eval"), splits, strict=True))
    note_left_out(whole(opened["train"]), data.train_split)
    note_left_out(opened["eval"], data.eval_split)
    train_transform, eval_transform = make_transforms(data)
    with reading(opened["train"], 0, patience) as examples:
        example = check_example(next(examples))
    label_of(example, len(opened["train"].class_names))
    image_shape = eval_transform(example["image"]).shape
    _check_channels(config, image_shape[-1])
    ignored = Ignored(eval_transform.pixels)
    shapes = {
        "train": shapes_of(example, to_array(train_transform.pixels(example["image"]))),
        "eval": _check_evaluation(
            config, opened["eval"], eval_transform, image_shape, patience, ignored
        ),
    }
    train_source, eval_source = opened["train"], opened["eval"]
    if data.in_memory or data.resident:
        train_source = in_memory(train_source, patience, train_transform.pixels)
        eval_source = in_memory(eval_source, patience, eval_transform.pixels)
    if data.resident and config.batch_size > len(train_source):
        raise UserError(
            f"batch_size={config.batch_size} is more than the {len(train_source)} training examples"
        )
    pixel_mean = None
    if data.pixel_mean:
        pixel_mean = mean_image.pixel_mean(train_source, eval_transform, image_shape, patience)
    return Data(
        train=train_source,
        eval=eval_source,
        train_transform=train_transform,
        eval_transform=eval_transform,
        image_shape=image_shape,
        preprocessing=make_preprocessing(data, pixel_mean),
        fingerprints={name: fingerprint.take(source) for name, source in opened.items()},
        files={name: fingerprint.listing(source) for name, source in opened.items()},
        shapes=shapes,
        notes=sentences(ignored.counts, f"of those looked at in {data.eval_split!r}", "data."),
    )


def _check_evaluation(
    config: ml_collections.ConfigDict,
    source: Source,
    transform: EvalTransform,
    image_shape: tuple[int, ...],
    patience: Patience,
    ignored: Ignored,
) -> Shapes:
    """The shapes of an example; raises UserError if an evaluation, hours from now, would fail."""
    split = config.data.eval_split
    shapes = check_examples(source, transform, split, patience, ignored)
    shape = shapes["image"]
    whole = 3 if config.data.pixel_mean else 1
    if shape[-whole:] != image_shape[-whole:]:
        raise UserError(
            f"the images of the split {split!r} have shape {list(shape)} (height, width, "
            f"channels), those of {config.data.train_split!r} {list(image_shape)}; give a split "
            "that fits"
        )
    return shapes


def _check_channels(config: ml_collections.ConfigDict, channels: int) -> None:
    for name in ("mean", "std"):
        given = len(config.data[name])
        if given not in (1, channels):
            convert = f", or convert the images by data.channels={given}" * (given in (3, 4))
            raise UserError(
                f"data.{name} has {given} numbers, but the images of {config.data.source} have "
                f"{channels} channel{'s' * (channels > 1)}; give one number or one per channel"
                f"{convert}"
            )
    if config.data.policy != "none" and channels not in (1, 3):
        raise UserError(
            f"data.policy changes grey and RGB images, but those of {config.data.source} have "
            f"{channels} channels; set it to none, or convert the images by data.channels=3"
        )
    if config.data.pca_lighting and channels != 3:
        raise UserError(
            f"data.pca_lighting shifts RGB, but the images of {config.data.source} have {channels} "
            f"channel{'s' * (channels > 1)}; set it to 0"
        )

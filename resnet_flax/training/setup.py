"""From a config to the things that it names."""

from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections

from resnet_flax import sharding
from resnet_flax.config import flatten
from resnet_flax.data import fingerprint, statistics
from resnet_flax.data.check import check_examples
from resnet_flax.data.experiment import (
    augment_and_normalize,
    make_preprocessing,
    make_transforms,
    open_splits,
)
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source, in_memory
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError
from resnet_flax.evaluation.step import eval_step
from resnet_flax.models import ResNet, configured_model
from resnet_flax.runtime import xla_options
from resnet_flax.training.norms import norm_over
from resnet_flax.training.optimizer import make_optimizer, make_schedule
from resnet_flax.training.state import init_state
from resnet_flax.training.steps import (
    compile_init,
    compile_resident,
    compile_statistics,
    compile_steps,
    statistics_step,
    train_step,
    unless_incomplete,
)


class Programs(NamedTuple):
    """What a config computes, compiled at the first call.

    Attributes:
      model: the network.
      schedule: the learning rate by the step.
      init: `init_state`.
      shardings: of the state.
      train_step: on a batch.
      resident_steps: on data that lies on the devices.
      eval_step: on a batch.
      statistics_step: on a batch.
    """

    model: ResNet
    schedule: Any
    init: Any
    shardings: Any
    train_step: Any
    resident_steps: Any
    eval_step: Any
    statistics_step: Any


def compile_programs(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    classes: int,
    image_shape: tuple[int, ...],
    preprocessing: Preprocessing | None = None,
) -> Programs:
    """The programs of a config, without its data.

    Args:
      config: resolved.
      mesh: of the devices, which need not be there.
      classes: of the labels.
      image_shape: `(height, width, channels)` of a training image.
      preprocessing: what the config says by default, without a mean image.
    """
    _check_batches(config, mesh.size)
    span = config.model.norm_span
    model = configured_model(
        config.model,
        classes,
        norm_groups(span, config.batch_size // config.accumulation, mesh.size),
    )
    schedule = make_schedule(config.optim, config.steps)
    tx = make_optimizer(config.optim, schedule)
    preprocessing = preprocessing or make_preprocessing(config.data)
    prepare = partial(
        augment_and_normalize,
        data=config.data,
        preprocessing=preprocessing,
        seed=config.seed,
        classes=classes,
        dtype=model.dtype,
    )
    init, shardings = compile_init(
        partial(init_state, model=model, tx=tx, image_shape=image_shape), mesh
    )
    train = partial(
        train_step,
        model=model,
        tx=tx,
        prepare=prepare,
        label_smoothing=config.optim.label_smoothing,
        parts=config.accumulation,
        run=int(span) if span.isdecimal() else 1,
        gather=sharding.gather(shardings.params, mesh),
        norm=norm_over(mesh),
    )
    if jax.process_count() > 1:
        train = partial(unless_incomplete, train=train)
    statistics_of = partial(statistics_step, model=model, prepare=prepare)
    normalize = partial(preprocessing.normalize, dtype=model.dtype)
    evaluate = partial(eval_step, model=model, prepare=normalize)
    devices = list(mesh.devices.flat)
    options = xla_options.options(devices[0].platform, image_shape, model.dtype, devices=devices)
    compiled_train, compiled_eval = compile_steps(mesh, shardings, train, evaluate, options)
    return Programs(
        model,
        schedule,
        init,
        shardings,
        compiled_train,
        compile_resident(mesh, shardings, train, options=options),
        compiled_eval,
        compile_statistics(mesh, shardings, statistics_of, options),
    )


class Run(NamedTuple):
    """A config made into things that work: what `train` loops over.

    Attributes:
      mesh: of the devices.
      train_source: examples to train on, one `ArraySource` where `data.resident`.
      eval_source: examples to evaluate on.
      train_transform: of an image, on the host.
      eval_transform: of an image, on the host.
      programs: on the devices.
      about: what checkpoints carry beside the state.
      files: of a folder, names and sizes of the images of "train" and "eval".
      notes: what the user should know about the config.
    """

    mesh: jax.sharding.Mesh
    train_source: Source
    eval_source: Source
    train_transform: TrainTransform
    eval_transform: EvalTransform
    programs: Programs
    about: dict[str, Any]
    files: dict[str, fingerprint.Files]
    notes: list[str]


def build(config: ml_collections.ConfigDict, patience: Patience = PATIENT) -> Run:
    """Opens the data and compiles nothing yet.

    Args:
      config: resolved.
      patience: for what is read, see `readers.reading`.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    _check_batches(config, mesh.size)
    data = config.data
    opened = dict(zip(("train", "eval"), open_splits(data), strict=True))
    if not len(opened["train"]):
        raise UserError(f"the split {data.train_split!r} of {data.source} has no example")
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
        sample = len(train_source) if data.resident or data.in_memory else statistics.SAMPLE
        pixel_mean = statistics.pixel_mean(train_source, eval_transform, sample, patience)
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
        mesh,
        train_source,
        eval_source,
        train_transform,
        eval_transform,
        programs,
        about,
        {name: fingerprint.listing(source) for name, source in opened.items()},
        _notes(config, programs.model),
    )


def _notes(config: ml_collections.ConfigDict, model: ResNet) -> list[str]:
    if config.accumulation > 1 and model.norm == "batch" and not config.model.norm_span.isdecimal():
        part = config.batch_size // config.accumulation
        return [
            f"warning: with accumulation={config.accumulation} batch normalisation averages over "
            f"each part of {part} examples, not over the batch of {config.batch_size}; "
            f"model.norm_span={part} or a divisor of it says the same with any accumulation"
        ]
    return []


def norm_groups(span: str, batch_size: int, devices: int) -> int:
    """The groups of examples that batch normalisation treats by themselves.

    Args:
      span: 'global' for one group, 'device' for each device's share, or a number of examples.
      batch_size: of the global batch.
      devices: that share it.
    """
    if span == "global":
        return 1
    return devices if span == "device" else batch_size // int(span)


def _check_batches(config: ml_collections.ConfigDict, devices: int) -> None:
    eval_batch_size = config.data.eval_batch_size or config.batch_size
    part = config.batch_size // config.accumulation
    for name, size in (
        ("batch_size", config.batch_size),
        ("batch_size / accumulation", part),
        ("eval batch size", eval_batch_size),
    ):
        if size % devices:
            raise UserError(
                f"{name} {size} does not divide over {devices} devices; it must be a multiple "
                f"of {devices}, such as {max(1, round(size / devices)) * devices}"
            )


def _check_evaluation(
    config: ml_collections.ConfigDict,
    source: Source,
    transform: EvalTransform,
    image_shape: tuple[int, ...],
    patience: Patience,
) -> None:
    """Raises UserError where an evaluation would fail, which may be hours from now."""
    split = config.data.eval_split
    shape = check_examples(source, transform, split, patience)
    whole = 3 if config.data.pixel_mean else 1
    if shape[-whole:] != image_shape[-whole:]:
        raise UserError(
            f"the images of the split {split!r} are of {list(shape)} (height, width, channels), "
            f"those of {config.data.train_split!r} of {list(image_shape)}; give a split that fits"
        )


def _check_channels(config: ml_collections.ConfigDict, channels: int) -> None:
    for name in ("mean", "std"):
        given = len(config.data[name])
        if given not in (1, channels):
            raise UserError(
                f"data.{name} has {given} numbers, but the images of {config.data.source} have "
                f"{channels} channel{'s' * (channels > 1)}; give one number or one a channel"
            )
    if config.data.colour and channels != 3:
        raise UserError(
            f"data.colour shifts RGB, but the images of {config.data.source} have {channels} "
            f"channel{'s' * (channels > 1)}; set it to 0"
        )

"""From a config to a run: its data, its task, the weights it starts from and its programs."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from resnet_flax import sharding
from resnet_flax.apply import given_data, tables
from resnet_flax.apply.experiment_data import open_data
from resnet_flax.apply.initial import starting_from
from resnet_flax.config import flatten, load_config
from resnet_flax.data.experiment import augment_and_normalize, make_preprocessing, open_splits
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.readers import PATIENT, Patience, WaitInterrupted, refuse_in_import
from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.metrics import METRICS
from resnet_flax.evaluation.result import Metrics, Result
from resnet_flax.models import ResNet, configured_model
from resnet_flax.runtime import distributed, numerics, storage
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.tasks.classification import Classification
from resnet_flax.training import loop
from resnet_flax.training.checkpoint_files import saved_class_names
from resnet_flax.training.losses import LOSSES
from resnet_flax.training.optimizer import make_optimizer, make_schedule
from resnet_flax.training.programs import Programs, compile_programs
from resnet_flax.training.run import Run


def train(
    config: ml_collections.ConfigDict | str | Path,
    workdir: str | Path,
    stop: SignalHandler | None = None,
    *,
    data: Any = None,
    eval_data: Any = None,
) -> Result:
    """Trains a network, or continues training; evaluates at the end.

    Args:
      config: an experiment: a config with any of the keys that `resnet-flax train --help` lists, or
        a config file such as 'configs/cifar10.py:resnet20'.
      workdir: created if missing; only one run at a time can use it. Gets checkpoints/,
        metrics.jsonl, tensorboard/, config.json, sessions.json, curves.png and, at the end,
        result.json. If it has a run of this config, that continues.
      stop: a context that was already entered, to handle signals before this call too.
      data: training data in place of the config's, see `given_data.as_source`: a directory of
        images with a subdirectory for each class, arrays `(images, labels)`, or a `Source`.
      eval_data: the same for the evaluation. Without it the config's `data.eval_split` is taken,
        which for arrays is 'holdout' (set `data.holdout`).

    Returns:
      The result on the evaluation split after the last step.

    Raises:
      UserError: the config, the data, the workdir or the devices do not fit, the disk is full, an
        image cannot be read, or the loss is not finite. The state is saved, unless it is not
        finite.
      Interrupted: a signal came (`runtime.signals`); the state is saved.
    """
    given = load_config(str(config)) if isinstance(config, str | Path) else config
    if not isinstance(given, ml_collections.ConfigDict):
        raise UserError(
            "config must be an ml_collections.ConfigDict, such as resnet_flax.default_config(), or "
            f"a config file, such as 'configs/cifar10.py:resnet20', not {type(given).__name__}"
        )
    checked = tables.check(given if data is None else given_data.with_source(given, data))
    if data is not None and not given_data.name_of(data):
        checked = given_data.without_source(checked)
    return run_experiment(checked, workdir, stop, data=data, eval_data=eval_data)


def run_experiment(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    stop: SignalHandler | None = None,
    *,
    data: Any = None,
    eval_data: Any = None,
) -> Result:
    """`train` with a config that is checked already."""
    refuse_in_import()
    with ExitStack() as stack:
        stack.enter_context(numerics.standard())
        stop = stack.enter_context(SignalHandler()) if stop is None else stop
        patience = Patience(config.data.timeout, _asked(stop))
        try:
            with distributed.together("cannot use its data"):
                order = saved_class_names(storage.local(workdir) / "checkpoints")
                splits = given_data.open_splits(config.data, data, eval_data, order)
                run = make_run(config, patience, splits)
        except WaitInterrupted:
            assert stop.signal is not None
            raise loop.interrupted(stop.signal, 0, Path(workdir)) from None
        result: Result = loop.train(run, workdir, stop)
        return result


def _asked(stop: SignalHandler) -> Callable[[], bool]:
    """Whether to stop waiting for data; never with several processes, which stop together."""
    return lambda: stop.signal is not None and jax.process_count() == 1


def make_run(
    config: ml_collections.ConfigDict,
    patience: Patience = PATIENT,
    splits: tuple[Source, Source] | None = None,
) -> Run:
    """Opens the data; loads no weights and compiles nothing yet.

    Args:
      config: checked.
      patience: see `readers.reading`.
      splits: for training and evaluation; by default those of the config.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batches(config, mesh.size)
    data = open_data(config, patience, splits or open_splits(config.data))
    classes = len(data.train.class_names)
    made = (config, mesh, classes, data.image_shape, data.preprocessing)
    task, programs = make_programs(*made)
    network = " ".join([config.model.name, *config.model.overrides.split()])
    return Run(
        config=config,
        keys=tables.keys(),
        title=f"{network} on {config.data.source}",
        mesh=mesh,
        task=task,
        programs=programs,
        train_source=data.train,
        eval_source=data.eval,
        train_transform=data.train_transform,
        eval_transform=data.eval_transform,
        about={
            "config": flatten(config),
            "class_names": list(data.train.class_names),
            "data": data.fingerprints,
            "preprocessing": data.preprocessing.to_json(),
            "devices": mesh.size,
        },
        files=data.files,
        shapes=data.shapes,
        notes=[*data.notes, *_notes(config, task.model)],
        patience=patience,
        initial=partial(
            starting_from,
            config.init,
            task.model,
            config.seed,
            channels=data.image_shape[-1],
            class_names=data.train.class_names,
        )
        if config.init
        else None,
        programs_at=lambda factor: make_programs(*made, rate_factor=factor)[1],
    )


def make_programs(
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    classes: int,
    image_shape: tuple[int, ...],
    preprocessing: Preprocessing | None = None,
    *,
    rate_factor: float = 1.0,
) -> tuple[Classification, Programs]:
    """The task of a config and its programs, without its data.

    Args:
      config: checked.
      mesh: of the devices, which need not be attached.
      classes: number of classes.
      image_shape: `(height, width, channels)` of a training image.
      preprocessing: by default that of the config, without a mean image.
      rate_factor: of all learning rates.
    """
    check_batches(config, mesh.size)
    span = config.model.bn_group_size
    groups = ghost_batches(span, config.batch_size // config.accumulation, mesh.size)
    model = configured_model(config.model, classes, groups)
    preprocessing = preprocessing or make_preprocessing(config.data)
    task = Classification(
        model=model,
        augment=partial(
            augment_and_normalize,
            data=config.data,
            preprocessing=preprocessing,
            classes=classes,
            dtype=model.dtype,
        ),
        normalize=partial(preprocessing.normalize, dtype=model.dtype),
        loss=LOSSES[config.optim.loss].make(config.optim),
        measures=Metrics(
            classes, more={name: METRICS[name] for name in config.eval.metrics.split()}
        ),
    )
    schedule = make_schedule(config.optim, config.steps, rate_factor)
    programs = compile_programs(
        task,
        mesh,
        image_shape,
        schedule=schedule,
        tx=make_optimizer(config.optim, schedule),
        num_microbatches=config.accumulation,
        bn_group_size=int(span) if span.isdecimal() else 1,
    )
    return task, programs


def ghost_batches(span: str, batch_size: int, devices: int) -> int:
    """The number of groups of examples that batch normalization treats separately.

    Args:
      span: 'global' for one group, 'device' for each device's part, or a number of examples.
      batch_size: of the global batch.
      devices: number of devices.
    """
    if span == "global":
        return 1
    return devices if span == "device" else batch_size // int(span)


def check_batches(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises UserError if a batch of the config cannot be divided over the devices."""
    eval_batch_size = config.data.eval_batch_size or config.batch_size
    part = config.batch_size // config.accumulation
    for name, size in (
        ("batch_size", config.batch_size),
        ("batch_size / accumulation", part),
        ("eval batch size", eval_batch_size),
    ):
        if size % devices:
            raise UserError(
                f"{name} {size} cannot be divided over {devices} devices; it must be a multiple "
                f"of {devices}, such as {max(1, round(size / devices)) * devices}"
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

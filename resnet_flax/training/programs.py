"""The compiled programs of a config, without its data."""

from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections

from resnet_flax import sharding
from resnet_flax.data.experiment import augment_and_normalize, make_preprocessing
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError
from resnet_flax.evaluation.step import eval_step
from resnet_flax.models import ResNet, configured_model
from resnet_flax.runtime import xla_options
from resnet_flax.training.compile import (
    compile_init,
    compile_resident,
    compile_statistics,
    compile_steps,
)
from resnet_flax.training.norms import norm_over
from resnet_flax.training.optimizer import make_optimizer, make_schedule
from resnet_flax.training.state import init_state
from resnet_flax.training.steps import statistics_step, train_step, unless_incomplete


class Programs(NamedTuple):
    """The functions of a config, compiled at the first call.

    Attributes:
      model: the network.
      schedule: the learning rate by the step.
      init: `init_state`.
      shardings: of the state.
      train_step: on a batch.
      resident_steps: on data that is resident on the devices.
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
      mesh: of the devices, which need not be attached.
      classes: number of classes.
      image_shape: `(height, width, channels)` of a training image.
      preprocessing: by default that of the config, without a mean image.
    """
    check_batches(config, mesh.size)
    span = config.model.bn_group_size
    groups = ghost_batches(span, config.batch_size // config.accumulation, mesh.size)
    model = configured_model(config.model, classes, groups)
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
        num_microbatches=config.accumulation,
        bn_group_size=int(span) if span.isdecimal() else 1,
        gather=sharding.gather(shardings.params, mesh),
        norm=norm_over(mesh),
    )
    if jax.process_count() > 1:
        train = partial(unless_incomplete, train=train)
    normalize = partial(preprocessing.normalize, dtype=model.dtype)
    evaluate = partial(eval_step, model=model, prepare=normalize)
    statistics_of = partial(statistics_step, model=model, prepare=prepare)
    options = _options(mesh, image_shape, model)
    compiled_train, compiled_eval = compile_steps(mesh, shardings, train, evaluate, options)
    resident = compile_resident(mesh, shardings, train, options=options)
    statistics = compile_statistics(mesh, shardings, statistics_of, options)
    return Programs(
        *(model, schedule, init, shardings),
        *(compiled_train, resident, compiled_eval, statistics),
    )


def _options(mesh: jax.sharding.Mesh, image_shape: tuple[int, ...], model: ResNet) -> Any:
    devices = list(mesh.devices.flat)
    return xla_options.options(devices[0].platform, image_shape, model.dtype, devices=devices)


def ghost_batches(span: str, batch_size: int, devices: int) -> int:
    """The number of groups of examples that batch normalisation treats separately.

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

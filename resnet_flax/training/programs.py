"""The compiled programs of a task, without its data."""

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.runtime import xla_options
from resnet_flax.training.compile import (
    compile_init,
    compile_resident,
    compile_statistics,
    compile_steps,
)
from resnet_flax.training.norms import norm_over
from resnet_flax.training.state import init_state
from resnet_flax.training.steps import Batch, statistics_step, train_step, unless_incomplete


@runtime_checkable
class Task(Protocol):
    """What a training is about; `tasks.classification` is one."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    def prepare(self, batch: Batch, step: Any, seed: Any) -> Batch:
        """A training batch on the device as the network takes it; see `train_step`."""
        ...

    def loss_fn(self, params: Any, batch_stats: Any, batch: Batch, rng: Any, step: Any) -> Any:
        """The loss, `(metrics, batch_stats)`; see `train_step`."""
        ...

    def keeping_nothing(self) -> "Task":
        """The same task with a network whose running statistics are those of the newest batch."""
        ...

    def eval_step(self, variables: Any, batch: Batch, states: Any) -> Any:
        """Adds a batch of an evaluation to the states of `measures`."""
        ...

    @property
    def measures(self) -> Any:
        """What an evaluation measures, see `evaluation.evaluate.Measures`."""
        ...


class Programs(NamedTuple):
    """The functions of a run, compiled at the first call.

    Attributes:
      model: the network.
      schedule: the learning rate by the step.
      tx: the optimizer.
      init: `init_state`.
      shardings: of the state.
      train_step: on a batch.
      resident_steps: on data that is resident on the devices.
      eval_step: on a batch.
      statistics_step: on a batch.
    """

    model: Any
    schedule: Any
    tx: optax.GradientTransformation
    init: Any
    shardings: Any
    train_step: Any
    resident_steps: Any
    eval_step: Any
    statistics_step: Any


def compile_programs(
    task: Task,
    mesh: Mesh,
    image_shape: tuple[int, ...],
    *,
    schedule: optax.Schedule,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
    bn_group_size: int = 1,
) -> Programs:
    """The programs of a task.

    Args:
      task: what to train.
      mesh: of the devices, which need not be attached.
      image_shape: `(height, width, channels)` of a training image.
      schedule: the learning rate by the step, which `tx` uses.
      tx: the optimizer.
      num_microbatches: see `train_step`.
      bn_group_size: see `train_step`.
    """
    model: Any = task.model
    init, shardings = compile_init(
        partial(init_state, model=model, tx=tx, image_shape=image_shape), mesh
    )
    train = partial(
        train_step,
        loss_fn=task.loss_fn,
        prepare=task.prepare,
        tx=tx,
        num_microbatches=num_microbatches,
        bn_group_size=bn_group_size,
        gather=sharding.gather(shardings.params, mesh),
        norm=norm_over(mesh),
    )
    if jax.process_count() > 1:
        train = partial(unless_incomplete, train=train)
    fresh = task.keeping_nothing()
    statistics = partial(statistics_step, loss_fn=fresh.loss_fn, prepare=fresh.prepare)
    devices = list(mesh.devices.flat)
    options = xla_options.options(devices[0].platform, image_shape, model.dtype, devices=devices)
    compiled_train, compiled_eval = compile_steps(mesh, shardings, train, task.eval_step, options)
    return Programs(
        model=model,
        schedule=schedule,
        tx=tx,
        init=init,
        shardings=shardings,
        train_step=compiled_train,
        resident_steps=compile_resident(mesh, shardings, train, options=options),
        eval_step=compiled_eval,
        statistics_step=compile_statistics(mesh, shardings, statistics, options),
    )

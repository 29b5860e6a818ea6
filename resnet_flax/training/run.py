"""A run: everything that the training loop needs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import ml_collections

from resnet_flax import sharding
from resnet_flax.data import fingerprint
from resnet_flax.data.pipeline import Batch, Shapes, blank_batch, eval_batches, train_batches
from resnet_flax.data.readers import Patience
from resnet_flax.data.sources import Source
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError
from resnet_flax.keys import Key
from resnet_flax.runtime import distributed
from resnet_flax.training.divergence import NONE, Recovery
from resnet_flax.training.programs import Programs, Task
from resnet_flax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop needs; `apply.experiment` makes it from a config.

    Attributes:
      config: checked.
      keys: all keys of the config.
      title: what is trained on what, in words.
      mesh: of the devices.
      task: what is trained.
      programs: of the task, on the devices.
      train_source: examples to train on, one `ArraySource` where `data.resident`.
      eval_source: examples to evaluate on.
      train_transform: of an image, on the host.
      eval_transform: of an image, on the host.
      about: metadata that checkpoints have besides the state.
      files: names and sizes of a folder's images, for "train" and "eval".
      notes: to print about the config.
      shapes: of an example of "train", before its transform, and of "eval", after it.
      patience: how long to wait for data.
      initial: returns the `params` and `batch_stats` to start from, and what to say about them;
        None for random ones. Not called where a run continues.
      programs_at: makes the programs with all learning rates multiplied by a number; None where
        that is not possible.
      recovery: what is done differently since training diverged.
    """

    config: ml_collections.ConfigDict
    keys: Mapping[str, Key]
    title: str
    mesh: jax.sharding.Mesh
    task: Task
    programs: Programs
    train_source: Source
    eval_source: Source
    train_transform: TrainTransform
    eval_transform: EvalTransform
    about: dict[str, Any]
    files: dict[str, fingerprint.Files]
    notes: list[str]
    shapes: dict[str, Shapes]
    patience: Patience
    initial: Callable[[], tuple[Mapping[str, Any], str]] | None = None
    programs_at: Callable[[float], Programs] | None = None
    recovery: Recovery = NONE

    @property
    def eval_batch_size(self) -> int:
        """The global batch size of an evaluation."""
        return int(self.config.data.eval_batch_size or self.config.batch_size)

    def after(self, recovery: Recovery) -> "Run":
        """The same run with another recovery; compiles again where the learning rate differs."""
        programs = self.programs
        if recovery.rate_factor != self.recovery.rate_factor:
            if self.programs_at is None:
                raise UserError(
                    "this run was made without Run.programs_at, which lowering the learning rate "
                    "needs; set optim.on_divergence to stop or skip_batches"
                )
            programs = self.programs_at(recovery.rate_factor)
        return dataclasses.replace(self, programs=programs, recovery=recovery)

    def initial_state(self) -> tuple[TrainState, list[str]]:
        """The state before the first step, and what to print about it."""
        state: TrainState = self.programs.init(sharding.put_number(self.config.seed, self.mesh))
        if self.initial is None:
            return state, []
        with distributed.together("cannot read the weights to start from"):
            variables, note = self.initial()
        shardings = self.programs.shardings
        params, batch_stats = (
            jax.tree.map(sharding.put_shared, variables[name], getattr(shardings, name))
            for name in ("params", "batch_stats")
        )
        # An optimizer's state may hold parameters, such as their average.
        opt_state = jax.jit(self.programs.tx.init, out_shardings=shardings.opt_state)(params)
        return TrainState(state.step, params, batch_stats, opt_state), [note]

    def train_batches(self, start: int) -> AbstractContextManager[Iterator[Batch]]:
        """This process's parts of the training batches from number `start`, endlessly."""
        return train_batches(
            self.train_source,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            transform=self.train_transform,
            repeats=self.config.data.repeats,
            start=start,
            data_offset=self.recovery.data_offset,
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=self.config.data.workers,
            patience=self.patience,
        )

    def blank_train_batch(self, step: int) -> Batch:
        """This process's part of a training batch, of which no example counts."""
        shapes = self.shapes["train"]
        image = self.train_transform.shape(shapes["image"], step)
        share = self.config.batch_size // jax.process_count()
        return blank_batch({**shapes, "image": image}, share)

    def blank_eval_batch(self, number: int = 0) -> Batch:
        """This process's part of a batch of an evaluation, of which no example counts."""
        del number  # all have the same shape
        return blank_batch(self.shapes["eval"], self.eval_batch_size // jax.process_count())

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

"""The input of the training loop: batches from the host, or data resident on the devices."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.data.parts import Parts
from resnet_flax.data.pipeline import Batch
from resnet_flax.data.sampler import Sampler
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState


@contextmanager
def open_input(run: Run, start: int) -> Iterator["Input"]:
    """The input of a run, from the step `start`."""
    config = run.config
    if config.data.resident:
        sampler = Sampler(len(run.train_source), config.seed, config.data.repeats)
        most = config.steps_per_dispatch
        yield Resident(
            run.programs.resident_steps,
            run.train_source,
            sampler,
            config.batch_size,
            most,
            run.mesh,
            config.seed,
            run.recovery.data_offset,
        )
        return
    with run.train_batches(start) as batches:
        parts = batches
        if jax.process_count() > 1:
            # The other processes wait for this one's part, see `steps.unless_incomplete`.
            parts = Parts(batches, run.blank_train_batch, start)
        yield Streaming(run.programs.train_step, parts, run.mesh, config.seed)


@runtime_checkable
class Input(Protocol):
    """Takes training steps.

    Attributes:
      most: largest number of steps at a time.
      waited: seconds spent waiting for batches from the host so far.
      error: why this process, one of several, contributes parts of batches that do not count.
    """

    most: int
    waited: float

    @property
    def error(self) -> Exception | None:
        """See above."""
        ...

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """Takes `n` steps from `step`; returns the state after them and the sums of each."""
        ...


class Streaming:
    """Takes one step for each batch from the host."""

    most = 1

    def __init__(
        self, train_step: Callable[..., Any], batches: Iterator[Batch], mesh: Mesh, seed: int
    ) -> None:
        self._train_step, self._batches, self._mesh = train_step, batches, mesh
        self._seed = sharding.put_number(seed, mesh)
        self.waited = 0.0

    @property
    def error(self) -> Exception | None:
        """See `Input`."""
        return self._batches.error if isinstance(self._batches, Parts) else None

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """See `Input`; the batches come in the order of steps."""
        began = time.monotonic()
        batch = next(self._batches)
        self.waited += time.monotonic() - began
        return self._train_step(state, sharding.put_batch(batch, self._mesh), self._seed)


class Resident:
    """Takes several steps at a time on images resident on every device; only indices are sent.

    Args:
      steps: compiled, see `compile.compile_resident`.
      source: the training images, an `ArraySource`.
      sampler: the order of examples.
      batch_size: of the global batch.
      most: largest number of steps at a time.
      mesh: of the devices.
      seed: of the run.
      data_offset: number of earlier batches that were left out.
    """

    def __init__(
        self,
        steps: Callable[..., Any],
        source: Any,
        sampler: Sampler,
        batch_size: int,
        most: int,
        mesh: Mesh,
        seed: int,
        data_offset: int = 0,
    ) -> None:
        self.most = most
        self.waited = 0.0
        self.error: Exception | None = None
        self._steps, self._sampler, self._mesh = steps, sampler, mesh
        self._batch_size, self._data_offset = batch_size, data_offset
        self._seed = sharding.put_number(seed, mesh)
        self._data = sharding.put_whole({"image": source.images, "label": source.labels}, mesh)

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """See `Input`."""
        share = self._batch_size // jax.process_count()
        rows = np.zeros((self.most, share), np.int32)
        for i in range(n):
            number = step + i + self._data_offset
            first = number * self._batch_size + jax.process_index() * share
            rows[i] = self._sampler.examples(first, share)
        indices = sharding.put_batch({"rows": rows}, self._mesh, axis=1)["rows"]
        return self._steps(state, self._data, indices, n, self._seed)

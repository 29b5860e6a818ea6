"""What the loop takes its steps by: batches that stream in, or data that lies on the devices."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.data.order import Order
from resnet_flax.data.pipeline import Batch, train_batches
from resnet_flax.train.setup import Run
from resnet_flax.train.state import TrainState


@contextmanager
def open_feed(run: Run, config: ml_collections.ConfigDict, start: int) -> Iterator["Feed"]:
    """What takes the steps of a run, from the step `start`."""
    data = config.data
    if data.resident:
        order = Order(len(run.train_source), config.seed, data.repeats)
        most = config.steps_per_dispatch
        yield Resident(
            run.programs.resident_steps, run.train_source, order, config.batch_size, most, run.mesh
        )
        return
    with train_batches(
        run.train_source,
        seed=config.seed,
        batch_size=config.batch_size,
        transform=run.train_transform,
        repeats=data.repeats,
        start=start,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=data.workers,
    ) as batches:
        yield Streaming(run.programs.train_step, batches, run.mesh)


@runtime_checkable
class Feed(Protocol):
    """Takes training steps.

    Attributes:
      most: steps that it can take at a time.
      waited: seconds that it has waited for batches from the host so far.
    """

    most: int
    waited: float

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """Takes `n` steps from `step`; returns the state after them and the sums of each."""
        ...


class Streaming:
    """A step for each batch that comes from the host."""

    most = 1

    def __init__(
        self, train_step: Callable[..., Any], batches: Iterator[Batch], mesh: Mesh
    ) -> None:
        self._train_step, self._batches, self._mesh = train_step, batches, mesh
        self.waited = 0.0

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """See `Feed`; the batches come in the order of steps."""
        began = time.monotonic()
        batch = next(self._batches)
        self.waited += time.monotonic() - began
        return self._train_step(state, sharding.put_batch(batch, self._mesh))


class Resident:
    """Several steps at a time on images that every device holds: only indices travel.

    Args:
      steps: compiled, see `steps.compile_resident`.
      source: the training images, an `ArraySource`.
      order: of examples.
      batch_size: of the global batch.
      most: steps at a time.
      mesh: of the devices.
    """

    def __init__(
        self,
        steps: Callable[..., Any],
        source: Any,
        order: Order,
        batch_size: int,
        most: int,
        mesh: Mesh,
    ) -> None:
        self.most = most
        self.waited = 0.0
        self._steps, self._order, self._mesh = steps, order, mesh
        self._batch_size = batch_size
        self._data = sharding.put_whole({"image": source.images, "label": source.labels}, mesh)

    def advance(self, state: TrainState, step: int, n: int) -> tuple[TrainState, Any]:
        """See `Feed`."""
        share = self._batch_size // jax.process_count()
        rows = np.zeros((self.most, share), np.int32)
        for i in range(n):
            first = (step + i) * self._batch_size + jax.process_index() * share
            rows[i] = self._order.examples(first, share)
        indices = sharding.put_batch({"rows": rows}, self._mesh, axis=1)["rows"]
        return self._steps(state, self._data, indices, n)

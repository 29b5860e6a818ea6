"""Reads the sums of steps from the device and writes records."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from resnet_flax.training.divergence import DivergedError, diverged
from resnet_flax.training.input import Input
from resnet_flax.training.parts import incomplete
from resnet_flax.training.writers import Writers

_NORMS = {"grad_norm", "param_norm", "stats_norm"}  # the other results of a step are sums
RATES = 1000  # learning rates that are computed at a time


class MetricsLogger:
    """Reads the sums of steps while the next ones run, so that the device never waits.

    Args:
      config: for the intervals.
      schedule: the learning rate, recorded with the sums.
      writers: get a record every `log.every` steps.
      input_: for the time spent waiting for data.
      unlogged: what the attribute was when the state to continue from was saved.
      data_offset: number of batches that were left out; records have it if there are any.

    Attributes:
      unlogged: the sums of the steps since the newest record, JSON. A record is of the same steps
        whether a run was interrupted between two records or not.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        schedule: Any,
        writers: Writers,
        input_: Input,
        unlogged: dict[str, float] | None = None,
        data_offset: int = 0,
    ) -> None:
        self._every, self._steps = config.log.every, config.steps
        self._batch_size = config.batch_size
        self._schedule, self._writers, self._input = schedule, writers, input_
        self._pending: tuple[int, int, Any] | None = None
        self.unlogged = dict(unlogged or {})
        self._left_out = {"data_offset": data_offset} if data_offset else {}
        self._clock: float | None = None
        self._images = self._waited = 0.0
        self._rates: dict[int, float] = {}

    def add(self, step: int, n: int, sums: Any) -> None:
        """Adds the sums of `n` steps just dispatched from `step`; reads the previous ones."""
        earlier, self._pending = self._pending, (step, n, sums)
        if earlier is not None:
            self._take(*earlier)

    def read(self) -> None:
        """Waits for the newest steps and reads their sums; writes records that are due.

        Raises:
          DivergedError: loss, gradients, parameters or running statistics are not finite.
          CommonError: one of several processes could not read its part of a batch.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._take(*pending)

    def forget(self) -> None:
        """Discards sums that were not read yet."""
        self._pending = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Reads, and excludes the time spent in the context from the speed."""
        self.read()
        began = time.monotonic()
        yield
        if self._clock is not None:
            self._clock += time.monotonic() - began

    def _take(self, start: int, n: int, sums: Any) -> None:
        rows = {name: np.atleast_1d(values) for name, values in jax.device_get(sums).items()}
        # The speed is measured from after the first compilation.
        now = time.monotonic()
        timed = self._clock is not None
        if self._clock is None:
            self._clock, self._waited = now, self._input.waited
        steps = [{name: float(values[i]) for name, values in rows.items()} for i in range(n)]
        faults = [self._fault(start + i, row) for i, row in enumerate(steps, start=1)]
        good = next((i for i, fault in enumerate(faults) if fault is not None), n)
        try:
            for step, row in enumerate(steps[:good], start=start + 1):
                self._images += row["count"] * timed
                elapsed = max(now - self._clock, 1e-9)
                waited = (self._input.waited - self._waited) / elapsed
                self._step(step, row, self._images / elapsed, waited)
        finally:
            # Raised even if an earlier record could not be written: it decides whether to save.
            if good < n:
                raise faults[good]  # type: ignore[misc]

    def _fault(self, step: int, sums: dict[str, float]) -> Exception | None:
        """Why the state after a step must not be saved; None if it may."""
        if sums["count"] < self._batch_size:
            # The step changed nothing, see `steps.unless_incomplete`.
            return incomplete(step - 1, f"the batch of step {step}", self._input.error)
        if not all(map(math.isfinite, sums.values())):
            norms = ", ".join(f"{name} {sums[name]:.4g}" for name in sums if name.endswith("norm"))
            return _diverged(step, f"loss {sums['loss'] / sums['count']:.4g}, {norms}")
        return None

    def _step(self, step: int, newest: dict[str, float], speed: float, waited: float) -> None:
        for name in newest.keys() - _NORMS:
            self.unlogged[name] = self.unlogged.get(name, 0.0) + newest[name]
        record = None
        if step % self._every == 0 or step == self._steps:
            sums, self.unlogged = self.unlogged, {}
            count = sums.pop("count")
            record = {
                "split": "train",
                "step": step,
                "loss": sums.pop("loss") / count,
                **{name: sums[name] / count for name in sorted(sums)},
                "grad_norm": newest["grad_norm"],
                "param_norm": newest["param_norm"],
                "learning_rate": self._learning_rate(step),
                **self._left_out,
                "images_per_second": round(speed, 1),
                # Fraction of the time spent waiting for batches; the devices may have been busy.
                "data_wait": round(min(waited, 1.0), 4),
            }
            self._writers.write(record)
        left = (self._steps - step) * newest["count"] / speed if speed else None
        self._writers.terminal.trained(step, record, left)

    def _learning_rate(self, step: int) -> float:
        """The learning rate of a step, from a table.

        Computing it now would wait on the device for the steps in flight, and delay the next one.
        """
        if step not in self._rates:
            ahead = range(step, step + RATES * self._every, self._every)
            steps = np.array([*(n for n in ahead if n < self._steps), self._steps])
            # Not compiled, where numbers of the schedule are transferred, whatever JAX's settings.
            with jax.transfer_guard("allow"):
                rates = np.asarray(jax.vmap(self._schedule)(steps - 1))
            self._rates = dict(zip(steps.tolist(), rates.tolist(), strict=True))
        return self._rates[step]


def _diverged(step: int, figures: str) -> DivergedError:
    """The error for a step whose results are not finite."""
    return diverged(
        step,
        figures,
        "no checkpoint has that step or a later one; start again in another --workdir with a lower "
        "optim.learning_rate or a longer optim.warmup_steps, or continue from the newest "
        "checkpoint by --config.optim.on_divergence=skip_batches or lower_rate",
    )

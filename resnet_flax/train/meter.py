"""From a step's sums on the device to records on the host."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from resnet_flax.errors import UserError
from resnet_flax.train.writers import Writers


class Meter:
    """Reads a step's sums when the next step is under way, so that the device never waits.

    Args:
      config: for the intervals.
      schedule: the learning rate, recorded beside the sums.
      writers: get a record every `log.every` steps.
    """

    def __init__(self, config: ml_collections.ConfigDict, schedule: Any, writers: Writers) -> None:
        self._every, self._steps = config.log.every, config.steps
        self._schedule, self._writers = schedule, writers
        self._pending: tuple[int, Any] | None = None
        self._sums = {"loss": 0.0, "errors": 0.0, "count": 0.0}
        # Of speed: the clock starts after this process's first step, which compiles.
        self._clock: float | None = None
        self._images, self._steps_timed = 0.0, 0

    def add(self, step: int, sums: Any) -> None:
        """Takes the sums of a step just dispatched, and reads those of the step before."""
        earlier, self._pending = self._pending, (step, sums)
        if earlier is not None:
            self._take(*earlier)

    def read(self) -> None:
        """Waits for the newest step and reads its sums; a record follows where one is due.

        Raises:
          UserError: loss, gradients or parameters are not finite.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._take(*pending)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Reads, and keeps what the context takes out of the speed."""
        self.read()
        began = time.monotonic()
        yield
        if self._clock is not None:
            self._clock += time.monotonic() - began

    def _take(self, step: int, sums: Any) -> None:
        sums = {name: float(value) for name, value in jax.device_get(sums).items()}
        if not all(map(math.isfinite, sums.values())):
            norms = ", ".join(f"{name} {sums[name]:.4g}" for name in sums if name.endswith("norm"))
            raise diverged(step, f"loss {sums['loss'] / sums['count']:.4g}, {norms}")
        for name in self._sums:
            self._sums[name] += sums[name]
        now = time.monotonic()
        if self._clock is None:
            self._clock = now
        else:
            self._images += sums["count"]
            self._steps_timed += 1
        speed = self._images / max(now - self._clock, 1e-9)
        record = None
        if step % self._every == 0 or step == self._steps:
            count = self._sums["count"]
            record = {
                "split": "train",
                "step": step,
                "loss": self._sums["loss"] / count,
                "error": self._sums["errors"] / count,
                "grad_norm": sums["grad_norm"],
                "param_norm": sums["param_norm"],
                "learning_rate": float(self._schedule(step - 1)),
                "images_per_second": round(speed, 1),
            }
            self._writers.write(record)
            self._sums = dict.fromkeys(self._sums, 0.0)
        left = (self._steps - step) * sums["count"] / speed if speed else None
        self._writers.terminal.trained(step, record, left)


def diverged(step: int, figures: str) -> UserError:
    """What is said where a step gave something that is not finite."""
    return UserError(
        f"training diverged at step {step} ({figures}); no checkpoint holds that step or a later "
        "one; start anew in another --workdir with a lower optim.learning_rate or a longer "
        "optim.warmup_steps"
    )

"""What follows when training diverges: the run stops, or goes back and does something differently.

It goes back to its newest checkpoint, or to its start if it has none. From there it leaves out the
batches that it took since then, as was done for PaLM (Chowdhery et al. 2022, section 5.1), or
lowers the learning rate.
"""

from collections import Counter
from typing import Any, NamedTuple

import ml_collections

from resnet_flax.errors import UserError


class DivergedError(UserError):
    """Loss, gradients, parameters or running statistics are not finite.

    Attributes:
      step: the first such step; None if only an evaluation noticed.
      figures: the step's loss and norms, in words.
    """

    def __init__(self, message: str, step: int | None = None, figures: str = "") -> None:
        super().__init__(message)
        self.step, self.figures = step, figures


def diverged(step: int, figures: str, what_follows: str) -> DivergedError:
    """The error for a step of training."""
    message = f"training diverged at step {step} ({figures}); {what_follows}"
    return DivergedError(message, step, figures)


class Recovery(NamedTuple):
    """What a run does differently since it diverged; checkpoints have it in their metadata.

    Attributes:
      data_offset: number of batches that were left out: step s + 1 takes batch s + data_offset of
        the data, counted from 0.
      rate_factor: by which all learning rates are multiplied.
    """

    data_offset: int = 0
    rate_factor: float = 1.0

    @classmethod
    def of(cls, meta: dict[str, Any]) -> "Recovery":
        """That in the metadata of a checkpoint; those from before 2026-11-29 have none."""
        return cls(**{name: meta[name] for name in cls._fields if name in meta})


NONE = Recovery()  # before training has diverged


class Recoveries:
    """Decides what a run does differently after each time that it diverges.

    Args:
      optim: the config's `optim`.
    """

    def __init__(self, optim: ml_collections.ConfigDict) -> None:
        self._optim = optim
        self._current = NONE
        self._diverged: DivergedError | None = None
        self._returned: Counter[int] = Counter()
        self._exhausted = False

    @property
    def returning(self) -> bool:
        """Whether training has diverged, and what follows has not begun."""
        return self._diverged is not None

    def note(self, error: DivergedError) -> None:
        """Notes that training diverged; raises the error if the run shall stop."""
        if self._optim.on_divergence == "stop" or self._exhausted or error.step is None:
            raise error
        self._diverged = error.with_traceback(None)  # its frames hold the state

    def begin(self, step: int, saved: Recovery) -> tuple[Recovery, dict[str, Any]]:
        """What to do differently from a checkpoint on.

        Args:
          step: of the checkpoint, 0 for the start.
          saved: the recovery in its metadata.

        Returns:
          The recovery; and JSON that describes why it is another one, empty if it is not.

        Raises:
          DivergedError: training diverged too often from this checkpoint.
        """
        error, self._diverged = self._diverged, None
        if error is None or error.step is None:
            self._current = saved
            return saved, {}
        self._returned[step] += 1
        most = self._optim.divergence_retries
        if self._returned[step] > most:
            self._exhausted = True
            raise diverged(
                error.step,
                error.figures,
                f"it has returned to step {step} {most} times, as optim.divergence_retries allows; "
                + f"remove the checkpoint of step {step} to continue from the one before, or "
                * (step > 0)
                + "start again in another --workdir with a lower optim.learning_rate or a longer "
                "optim.warmup_steps",
            )
        offset, factor = self._current
        if self._optim.on_divergence == "skip_batches":
            offset += error.step - step
        else:
            factor *= self._optim.divergence_factor
        self._current = Recovery(offset, factor)
        happened = {"diverged_at": error.step, "figures": error.figures}
        return self._current, {**happened, **self._current._asdict()}


def describe(step: int, recovered: dict[str, Any]) -> str:
    """A sentence on going back to a step; `recovered` is that of `Recoveries.begin`."""
    offset, factor = recovered["data_offset"], recovered["rate_factor"]
    changes = [f"{offset} batches left out so far"] if offset else []
    changes += [f"all learning rates multiplied by {factor:.4g}"] if factor != 1 else []
    return (
        f"warning: training diverged at step {recovered['diverged_at']} ({recovered['figures']}); "
        f"it continues from step {step} with {' and '.join(changes)}"
    )

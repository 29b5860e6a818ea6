"""What the loop works with, and how what was trained is saved, whatever happens."""

import contextlib
import dataclasses
from pathlib import Path

import jax

from resnet_flax.errors import UserError
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.storage import OF_THE_MACHINE
from resnet_flax.training.checkpoint import Checkpoints, SaveError
from resnet_flax.training.input import Input
from resnet_flax.training.metrics_logger import DivergedError, IncompleteError, MetricsLogger
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState
from resnet_flax.training.writers import Writers


class Interrupted(Exception):  # noqa: N818  no error
    """A signal ended the run; what is needed to go on is saved.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclasses.dataclass
class Position:
    """Where a run is.

    Attributes:
      state: after `step` steps.
      step: see there.
      saved: the step of the newest checkpoint that is, or is being, written.
      averaged: whether `eval.recompute_bn` is done, or not asked for.
    """

    state: TrainState
    step: int
    saved: int
    averaged: bool


@dataclasses.dataclass(frozen=True)
class Session:
    """What the loop works with, from its first step to its last.

    Attributes:
      run: what the config was made into.
      workdir: of the run.
      checkpoints: saves.
      writers: of records and to the terminal.
      input: takes the steps.
      metrics_logger: reads what they gave.
      stop: hears signals.
    """

    run: Run
    workdir: Path
    checkpoints: Checkpoints
    writers: Writers
    input: Input
    metrics_logger: MetricsLogger
    stop: SignalHandler


def save(session: Session, at: Position) -> None:
    """Saves the state where that is not done; raises DivergedError where it is not finite."""
    if at.step == at.saved:
        return
    with session.metrics_logger.paused():
        # The records first: after a power failure none may be missing of before the checkpoint.
        session.writers.sync()
        about = {**session.run.about, "averaged": at.averaged}
        session.checkpoints.save(at.step, at.state, about)
    at.saved = at.step


def rescue(session: Session, at: Position, error: Exception) -> Exception:
    """What to raise where the loop raised `error`: it, and where that which was trained is.

    An image that cannot be read, a reader that was killed, a full disk, a fault of this program:
    the state of the steps so far is as good as before.
    """
    if isinstance(error, IncompleteError):  # in all processes, at the same step
        at.step = error.step
        session.metrics_logger.forget()
        error = session.input.error or UserError(
            f"another process could not read its share of the batch of step {at.step + 1} and says "
            "why"
        )
    elif isinstance(error, Interrupted | DivergedError) or jax.process_count() > 1:
        return error
    elif isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        name = error.filename or f"a file in {session.workdir}"
        error = UserError(f"{name} cannot be used: {error.strerror or error}")
    if isinstance(error, SaveError):
        at.saved = -1  # it is not; once more
    before = session.checkpoints.steps()[:1]
    try:
        _save_whatever_happened(session, at)
    except DivergedError:
        return error
    except SaveError as failed:
        known = isinstance(error, SaveError)  # the disk is as full as before
        return error if known else UserError(f"{error}; besides, {failed}")
    saved = session.checkpoints.steps()
    if not saved:
        return error
    where = f"step {saved[0]} is saved in {session.workdir}, the same command continues from there"
    if isinstance(error, SaveError):
        return error if saved[:1] == before else UserError(f"{error.what} ({where})")
    if isinstance(error, UserError):
        return UserError(f"{error} ({where})")
    error.add_note(where)
    return error


def _save_whatever_happened(session: Session, at: Position) -> None:
    """Saves the state, though records may not be writable or a step may have broken off."""
    with contextlib.suppress(OSError):
        session.metrics_logger.read()
        session.writers.sync()
    lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(at.state))
    if at.step != at.saved and not lost:
        about = {**session.run.about, "averaged": at.averaged}
        session.checkpoints.save(at.step, at.state, about)
        at.saved = at.step
    session.checkpoints.wait()

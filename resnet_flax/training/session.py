"""The session of a training loop, and saving its state whatever happens."""

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


class Interrupted(Exception):  # noqa: N818  not an error
    """A signal stopped the run; everything needed to continue is saved.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclasses.dataclass
class Position:
    """The progress of a run.

    Attributes:
      state: after `step` steps.
      step: number of steps taken.
      saved: the step of the newest checkpoint that is written or being written.
      averaged: whether `eval.recompute_bn` is done or off.
    """

    state: TrainState
    step: int
    saved: int
    averaged: bool


@dataclasses.dataclass(frozen=True)
class Session:
    """The objects that the loop uses from its first step to its last.

    Attributes:
      run: data and programs of the config.
      workdir: of the run.
      checkpoints: saves the state.
      writers: for records and the terminal.
      input: takes the steps.
      metrics_logger: reads their results.
      stop: receives signals.
    """

    run: Run
    workdir: Path
    checkpoints: Checkpoints
    writers: Writers
    input: Input
    metrics_logger: MetricsLogger
    stop: SignalHandler


def save(session: Session, at: Position) -> None:
    """Saves the state unless it is saved; raises DivergedError if it is not finite."""
    if at.step == at.saved:
        return
    with session.metrics_logger.paused():
        # Records first: after a power failure none from before the checkpoint may be missing.
        session.writers.sync()
        about = {**session.run.about, "averaged": at.averaged}
        session.checkpoints.save(at.step, at.state, about)
    at.saved = at.step


def rescue(session: Session, at: Position, error: Exception) -> Exception:
    """The error to raise after the loop raised `error`, which also says where the state is saved.

    After an unreadable image, a killed reader, a full disk or a bug in this program, the state of
    the steps so far is still valid.
    """
    if isinstance(error, IncompleteError):  # in all processes, at the same step
        at.step = error.step
        session.metrics_logger.forget()
        error = session.input.error or UserError(
            f"another process could not read its part of the batch of step {at.step + 1}; see its "
            "why"
        )
    elif isinstance(error, Interrupted | DivergedError) or jax.process_count() > 1:
        return error
    elif isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        name = error.filename or f"a file in {session.workdir}"
        error = UserError(f"{name} cannot be used: {error.strerror or error}")
    if isinstance(error, SaveError):
        at.saved = -1  # not saved; try again
    before = session.checkpoints.steps()[:1]
    try:
        _save_whatever_happened(session, at)
    except DivergedError:
        return error
    except SaveError as failed:
        known = isinstance(error, SaveError)  # saving would fail again
        return error if known else UserError(f"{error}; besides, {failed}")
    saved = session.checkpoints.steps()
    if not saved:
        return error
    where = f"step {saved[0]} is saved in {session.workdir}; the same command continues from there"
    if isinstance(error, SaveError):
        return error if saved[:1] == before else UserError(f"{error.what} ({where})")
    if isinstance(error, UserError):
        return UserError(f"{error} ({where})")
    error.add_note(where)
    return error


def _save_whatever_happened(session: Session, at: Position) -> None:
    """Saves the state even if records cannot be written or a step was interrupted."""
    with contextlib.suppress(OSError):
        session.metrics_logger.read()
        session.writers.sync()
    lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(at.state))
    if at.step != at.saved and not lost:
        about = {**session.run.about, "averaged": at.averaged}
        session.checkpoints.save(at.step, at.state, about)
        at.saved = at.step
    session.checkpoints.wait()

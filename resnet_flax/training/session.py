"""The session of a training loop, and saving its state whatever happens."""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from resnet_flax.errors import UserError
from resnet_flax.runtime import machine
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.checkpoint import Checkpoints, SaveError
from resnet_flax.training.divergence import DivergedError
from resnet_flax.training.input import Input
from resnet_flax.training.metrics_logger import MetricsLogger
from resnet_flax.training.parts import CommonError
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


def save(session: Session, at: Position, needed: bool) -> None:
    """Saves the state unless it is saved.

    Args:
      session: whose checkpoints these are.
      at: the state.
      needed: whether it must be saved even where `checkpoint.on_failure` is 'continue', because
        training ends.

    Raises:
      DivergedError: the state is not finite.
      SaveError: it could not be saved.
    """
    with session.metrics_logger.paused():
        finish_save(session, at, wait=True)
        if at.step == at.saved:
            return
        # Records first: after a power failure none from before the checkpoint may be missing.
        session.writers.sync()
        about = _about(session, at)
        with _failure_noted(session, at, needed):
            session.checkpoints.save(at.step, at.state, about)
            at.saved = at.step


def _about(session: Session, at: Position) -> dict[str, Any]:
    """The metadata of a checkpoint."""
    return {
        **session.run.about,
        **session.run.recovery._asdict(),
        "averaged": at.averaged,
        "unlogged": session.metrics_logger.unlogged,
    }


def finish_save(session: Session, at: Position, wait: bool = False) -> None:
    """Finishes the save in progress, if that needs no waiting or `wait`.

    Raises:
      SaveError: it failed, unless `checkpoint.on_failure` is 'continue'.
    """
    with _failure_noted(session, at, needed=False):
        if wait:
            session.checkpoints.wait()
        else:
            session.checkpoints.poll()


@contextlib.contextmanager
def _failure_noted(session: Session, at: Position, needed: bool) -> Iterator[None]:
    """A context in which a failed save is only reported if training shall continue."""
    try:
        yield
    except SaveError as failed:
        at.saved = -1
        checkpoint = session.run.config.checkpoint
        # Several processes would have to agree.
        if needed or checkpoint.on_failure == "stop" or jax.process_count() > 1:
            raise
        session.writers.terminal.say(f"warning: {failed.why}; training continues")


def rescue(session: Session, at: Position, error: Exception) -> Exception:
    """The error to raise after the loop raised `error`, which also says where the state is saved.

    After an unreadable image, a killed reader, a full disk or a bug in this program, the state of
    the steps so far is still valid.
    """
    if isinstance(error, CommonError):
        at.step, error = error.step, error.error
        session.metrics_logger.forget()
    elif isinstance(error, DivergedError):
        try:
            finish_save(session, at, wait=True)
        except SaveError as failed:
            return UserError(f"{failed}; besides, {error}")
        return error
    elif isinstance(error, Interrupted) or jax.process_count() > 1:
        return error
    if isinstance(error, SaveError):
        at.saved = -1  # not saved; try again
        try:
            session.writers.sync()
        except OSError as why:
            error = why if why.errno == errno.ESTALE else error  # the workdir is gone
    error = machine.explained(error, f"a file in {session.workdir}") or error
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
        kind = DivergedError if isinstance(error, DivergedError) else UserError
        return kind(f"{error} ({where})")
    error.add_note(where)
    return error


def _save_whatever_happened(session: Session, at: Position) -> None:
    """Saves the state even if records cannot be written or a step was interrupted."""
    with contextlib.suppress(OSError):
        session.metrics_logger.read()
        session.writers.sync()
    try:
        session.checkpoints.wait()
    except SaveError:  # of an earlier step, or of this one, which is tried again
        at.saved = -1
    lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(at.state))
    if at.step != at.saved and not lost:
        about = _about(session, at)
        session.checkpoints.save(at.step, at.state, about)
        at.saved = at.step
    session.checkpoints.wait()

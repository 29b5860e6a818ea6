"""Signals that ask a run to stop, recorded for the loop to act on at its next step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# SIGHUP is sent when a terminal closes, SIGUSR1 by SLURM's `--signal` before the time limit.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))


class SignalHandler:
    """A context in which `SIGNALS` only set `signal`; a second Ctrl-C has its usual effect.

    A second one of the others does not: a closing terminal sends SIGHUP more than once, and SLURM's
    SIGTERM follows its SIGUSR1. If SIGHUP is ignored, as under `nohup`, it stays ignored. In
    threads other than the main one, where Python allows no handlers, the context does nothing.

    Attributes:
      signal: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and number.name == "SIGHUP"):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._previous.pop(signal.SIGINT))  # type: ignore[arg-type]

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


@contextlib.contextmanager
def not_ignored(end: Callable[[], object]) -> Iterator[None]:
    """A context in which no Ctrl-C is lost.

    Python prints and ignores an exception in a destructor or in a callback of its garbage
    collector, of which JAX has one; a KeyboardInterrupt there calls `end` instead.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            end()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before

"""Signals that ask a run to end, turned into a wish that the loop grants at its next step."""

import signal
import threading
from types import FrameType

# SIGHUP comes when a terminal is closed, SIGUSR1 from SLURM's `--signal` before the time is up.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))


class SignalHandler:
    """A context in which `SIGNALS` only set `signal`; a second Ctrl-C acts as always.

    Not a second one of the others: a terminal that is closed sends SIGHUP more than once, and
    SLURM's SIGTERM follows its SIGUSR1. SIGHUP stays ignored where it is, as `nohup` has it. In a
    thread other than the main one, where Python allows no handlers, nothing changes.

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

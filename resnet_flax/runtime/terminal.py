"""Output that may fail: a pipe whose reader is gone or stopped, a closed terminal, a full disk.

A failure to print never affects what was trained.
"""

import contextlib
import datetime
import io
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from resnet_flax.runtime import storage

# A closed file raises ValueError, and a file-like object may lack methods.
_FAILURES = (OSError, ValueError, AttributeError)
# Seconds that one write may take before later ones are dropped.
PATIENCE = 2.0
# Events that are set when writes have finished.
_writes: weakref.WeakSet[threading.Event] = weakref.WeakSet()


class Unfailing:
    """A text file whose writes are dropped if they fail, or if nobody reads them.

    Args:
      file: to write to; None, as `sys.stdout` is if it was closed, drops everything.
      log: a file that notes the first failure; None for none.
    """

    def __init__(self, file: Any, log: Path | None = None) -> None:
        self._file, self._log = file, log
        self._text: list[str] = []
        self._done = threading.Event()
        self._done.set()

    def write(self, text: str) -> int:
        """Buffers the text for `flush`."""
        self._text.append(text)
        return len(text)

    def flush(self) -> None:
        """Writes the buffer in a thread, as a write to a pipe that nobody reads never returns."""
        text, self._text = "".join(self._text), []
        if not self._done.is_set():
            return  # dropped
        self._done = threading.Event()
        _writes.add(self._done)
        threading.Thread(target=self._write, args=(text, self._done), daemon=True).start()
        if not self._done.wait(PATIENCE):
            self._note("nobody reads what was written")

    def isatty(self) -> bool:
        """Whether the file is a terminal."""
        try:
            return bool(self._file.isatty())
        except _FAILURES:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _write(self, text: str, done: threading.Event) -> None:
        try:
            if self._file is None:
                return
            try:
                self._file.write(text)
            except UnicodeEncodeError as error:
                known = text.encode(error.encoding, "backslashreplace")
                self._file.write(known.decode(error.encoding))
            self._file.flush()
        except _FAILURES as error:
            self._note(getattr(error, "strerror", None) or str(error))
        finally:
            done.set()

    def _note(self, reason: str) -> None:
        log, self._log = self._log, None
        if log is not None:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            storage.note(log, f"{now} the terminal cannot be written ({reason}); the run continues")


def say(text: object, file: Any = None) -> None:
    """Prints a line, by default to standard output, if that can be done."""
    print(text, file=Unfailing(sys.stdout if file is None else file), flush=True)


def open_closed() -> None:
    """Opens the standard streams that were closed, as by `>&-`, so that they drop everything.

    The next files that are opened would get their numbers, and what C++ code prints as text.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def escape_unknown() -> None:
    """Lets standard output and error escape what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stuck() -> bool:
    """Whether a thread hangs in a write; Python would wait for it at exit."""
    return any(not done.is_set() for done in _writes)


def leave_quietly() -> None:
    """Drops what standard output and error have buffered and cannot write; for a program's end.

    Python would try once more, print an error, and exit with 120.
    """
    if stuck():
        return
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except _FAILURES:
            with contextlib.suppress(*_FAILURES, io.UnsupportedOperation):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

"""Output that may fail: a pipe whose reader is gone, a terminal that was closed, a full disk.

Whether something can be printed never decides about what was trained.
"""

import contextlib
import datetime
import os
import sys
from pathlib import Path
from typing import Any

# A closed file raises ValueError.
_FAILURES = (OSError, ValueError)


class Unfailing:
    """A text file whose writes are lost where they fail.

    Args:
      file: written to.
      log: a file that notes the first failure; None for none.
    """

    def __init__(self, file: Any, log: Path | None = None) -> None:
        self._file, self._log = file, log

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        self._try(self._file.write, text)
        return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase`."""
        self._try(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _try(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except _FAILURES as error:
            log, self._log = self._log, None
            if log is not None:
                now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
                reason = getattr(error, "strerror", None) or error
                note = f"{now} the terminal cannot be written ({reason}); the run goes on\n"
                with contextlib.suppress(OSError), log.open("a") as file:
                    file.write(note)


def say(text: object, file: Any = None) -> None:
    """Prints a line, by default to standard output, if that can be done."""
    print(text, file=Unfailing(sys.stdout if file is None else file), flush=True)


def leave_quietly() -> None:
    """Drops what standard output and error still hold and cannot write; for a program's end.

    Python would try once more, complain of it, and end with 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except _FAILURES:
            with contextlib.suppress(*_FAILURES):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

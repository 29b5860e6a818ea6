"""Files to which whole entries are appended."""

import contextlib
import errno
import os
from pathlib import Path

from resnet_flax.runtime.storage.errors import naming


class AppendedFile:
    """A file to which whole entries are appended.

    It is unbuffered: an entry is written immediately and survives a kill. An entry that cannot be
    written, as on a full disk, leaves no part in the file, and is written before the next one.

    Args:
      path: of the file; created if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def append(self, entry: bytes) -> None:
        """Appends an entry; raises OSError, which names the file, if it must wait."""
        self._waiting.append(entry)
        self._write()

    def sync(self) -> None:
        """Returns when all entries are on the disk."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self) -> None:
        self._check_in_place()
        while self._waiting:
            end = self._file.seek(0, os.SEEK_END)
            try:
                with naming(self._file.name):
                    left = memoryview(self._waiting[0])
                    while left:  # a write to a nearly full disk may be partial
                        left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(end)
                raise
            del self._waiting[0]

    def _check_in_place(self) -> None:
        """Raises OSError if nobody would find what is written."""
        ours = os.fstat(self._file.fileno())
        try:
            there = os.stat(self._file.name)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            gone = "it, or its directory, was removed, moved or replaced during the run"
            raise OSError(errno.ESTALE, gone, self._file.name)


def note(path: Path, line: str) -> None:
    """Appends a line to a file if that can be done; it is not synced."""
    with contextlib.suppress(OSError), path.open("a") as file:
        file.write(f"{line}\n")

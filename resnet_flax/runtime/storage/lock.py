"""One run in a workdir at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from resnet_flax.errors import UserError
from resnet_flax.runtime.storage.writing import make_directory
from resnet_flax.runtime.terminal import say

NAME = ".lock"
# Seconds between heartbeats of the run that has a lock, and without one until another host
# considers it dead.
BEAT = 10.0
PATIENCE = 35.0
# Errors of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Lock:
    """A context that only one process at a time can enter, for a directory.

    The file `.lock` in it is locked by the kernel (`flock`) until the process ends, however that
    ends, and describes the process. On shared file systems such locks may be local to a host, so
    the file's time is also updated every ten seconds, and another host's lock is valid as long as
    that continues.

    Args:
      directory: created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / NAME
        self._file = -1
        self._released = threading.Event()

    def __enter__(self) -> "Lock":
        make_directory(self._directory)
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._take()
                if self._is_in_place():
                    break
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # the previous run has just removed it
        record = json.dumps(_this_process()).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, record, 0)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            if self._is_in_place():
                self._path.unlink()
        os.close(self._file)

    def _take(self) -> None:
        """Takes the lock; raises UserError if another process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel_locks = True
        except BlockingIOError:
            raise self._refusal(self._holder()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            kernel_locks = False
        holder = _record(self._file)
        if holder is None:
            return
        here = _this_process()
        if (holder.get("host"), holder.get("boot")) == (here["host"], here["boot"]):
            if not kernel_locks and holder.get("began") == _began(holder.get("pid", -1)):
                raise self._refusal(holder)
            return
        if holder.get("host") != here["host"] and self._is_alive(holder):
            raise self._refusal(holder)

    def _holder(self) -> dict[str, Any] | None:
        """The process that has the lock; waits a moment if that is not written yet."""
        for _ in range(20):
            holder = _record(self._file)
            if holder is not None:
                return holder
            time.sleep(0.05)
        return None

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Whether a run on another host still updates the file's time; takes half a minute if not.

        It watches the file's time, so clocks of two hosts are never compared.
        """
        seen = _time(self._path)
        say(
            f"{self._directory} was last used by process {holder.get('pid')} on "
            f"{holder.get('host')}; waiting up to {PATIENCE:.0f} s to see whether it still runs"
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(BEAT / 10)
            if _time(self._path) != seen:
                return True
        return False

    def _refusal(self, holder: dict[str, Any] | None) -> UserError:
        who = "another run"
        if holder is not None:
            who = (
                f"a run that process {holder.get('pid')} on {holder.get('host')} began at "
                f"{holder.get('time')}"
            )
        return UserError(
            f"{self._directory} is in use by {who}; wait until it ends, stop it, or give another "
            "--workdir"
        )

    def _is_in_place(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._file)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "began": _began(os.getpid()),
    }


def _record(file: int) -> dict[str, Any] | None:
    """The process that has or had a lock; None if that is not written, as right after creation."""
    try:
        record = json.loads(os.pread(file, 10_000, 0))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _time(path: Path) -> int:
    """When the file was last changed; it is opened, as NFS asks the server only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _began(pid: int) -> str:
    """The start time of a process, in the kernel's ticks; empty if there is no such process."""
    stat = _read(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if stat else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""

"""Reading batches: a thread that watches Grain's reader threads or processes.

Grain itself waits forever for a frozen reader or a hanging disk, and its processes are killed by
the signals that a terminal or SLURM sends to all processes of a job. Here the training loop waits
in the main thread, which handles signals and a timeout.
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
from absl import flags

from resnet_flax.errors import SettingError, UserError
from resnet_flax.runtime.signals import SIGNALS

# Seconds that readers get to stop by themselves, and between checks on them while waiting.
GRACE, LOOK = 5.0, 0.1
# The name of Grain's processes.
_NAME = "grain-process-prefetch"
# Events that threads set when they end after being asked to: a thread that hangs in a read cannot
# be stopped. (Not the threads themselves: after a Ctrl-C in its `join`, one claims to have ended.)
_closed: weakref.WeakSet[threading.Event] = weakref.WeakSet()
# Reader processes that were seen, and the PIDs of those that were stopped here.
_seen: set[Any] = set()
_ended: set[int] = set()


# The status of a reader process that `refuse_in_import` ended, and the sentence on it.
_UNGUARDED = 93
_GUARD = (
    "the processes of data.workers import the main script, which starts training or reading when "
    'it is imported; put its calls below `if __name__ == "__main__":`, or use data.workers=0'
)


class WaitInterrupted(Exception):  # noqa: N818  not an error
    """A signal came while waiting for a batch."""


class Patience(NamedTuple):
    """How long to wait for data.

    Attributes:
      timeout: seconds to wait for an element; 0 for no limit.
      interrupted: polled while waiting, which ends when it returns true.
    """

    timeout: float = 0.0
    interrupted: Callable[[], bool] = lambda: False


PATIENT = Patience()


@contextlib.contextmanager
def reading(
    examples: Any,
    workers: int,
    patience: Patience = PATIENT,
) -> Iterator[Iterator[Any]]:
    """The elements of a sequence in order, read ahead.

    Args:
      examples: with `__len__` and `__getitem__`; picklable if there are `workers`.
      workers: reader processes; 0 reads in threads of this one.
      patience: how long to wait for elements.

    Yields:
      An iterator. It raises UserError if a reader was killed or nothing arrives in time,
      `WaitInterrupted` if interrupted, and whatever reading raises. Leaving the context stops the
      readers.
    """
    if workers:
        refuse_in_import()
    reader = _Reader(examples, workers, patience)
    try:
        yield reader
    finally:
        reader.close()


def refuse_in_import() -> None:
    """Ends a reader process whose import of the main script started a run or readers of its own.

    Python imports the script in each new process; what is not below `if __name__ == "__main__":`
    is executed again.

    Raises:
      UserError: another program's process does so.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        if process.name.startswith(_NAME):
            os._exit(_UNGUARDED)  # the main process says why
        raise UserError(_GUARD)


def stuck() -> bool:
    """Whether a thread hangs in a read; Python would wait for it at exit."""
    return any(not done.is_set() for done in _closed)


def kill_processes() -> None:
    """Kills the reader processes that are left; for a program that ends by `os._exit`.

    One that is frozen does not see that its parent ends, and would keep its memory.
    """
    for process in _grain_processes():
        _ended.add(process.pid)
        process.kill()


class _Signed:
    """Examples, each with the PID of the process that read it."""

    def __init__(self, examples: Any) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return os.getpid(), self._examples[index]


class _Reader:
    def __init__(self, examples: Any, workers: int, patience: Patience) -> None:
        self._examples, self._workers = examples, workers
        self._timeout, self._interrupted = patience
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
        self._closed, self._done = threading.Event(), threading.Event()
        self._processes: set[int] = set()  # PIDs seen so far, from the examples that they read
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> Any:
        looks = 0  # not a clock, which runs on while the job is suspended
        while self._ended is None:
            try:
                element, self._ended = self._queue.get(timeout=LOOK)
            except queue.Empty:
                looks += 1
                self._look(looks * LOOK)
            else:
                if self._ended is None:
                    self._processes.add(element[0])
                    return element[1]
        code = re.search(r"Worker process was terminated .* exit code (-?\d+)", str(self._ended))
        if code:
            raise _died(int(code[1])) from None  # the cause says less
        raise self._ended

    def close(self) -> None:
        """Stops the readers, after a while by force."""
        self._closed.set()
        _closed.add(self._done)
        if self._done.wait(GRACE):
            return
        for process in _grain_processes():
            if process.pid in self._processes:
                _ended.add(process.pid)
                process.kill()
        self._done.wait(GRACE)

    def _look(self, waited: float) -> None:
        _check_processes()
        if self._interrupted():
            raise WaitInterrupted
        if self._timeout and waited > self._timeout:
            raise UserError(
                f"nothing was read within data.timeout={self._timeout:g} seconds; a reader is "
                "frozen, or the disk or network with the data does not respond: fix that, or "
                "increase data.timeout (0 for no limit)"
            )

    def _read(self) -> None:
        """Reads ahead; the body of the thread."""
        try:
            _block_signals()
            batches = iter(self._dataset())
            try:
                while not self._closed.is_set():
                    self._put((next(batches), None))
            finally:
                batches.close()
        except BaseException as error:
            self._put((None, error))
        finally:
            self._done.set()

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=LOOK)
                break

    def _dataset(self) -> Any:
        # An element is usually a batch, so prefetching a few is enough.
        threads = 2 if self._workers else max(2, os.cpu_count() or 2)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        dataset = grain.MapDataset.source(_Signed(self._examples)).to_iter_dataset(options)
        if not self._workers:
            return dataset
        if not flags.FLAGS.is_parsed():  # required by Grain's workers, also in notebooks
            flags.FLAGS.mark_as_parsed()
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self._workers),
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
        )


def _check_processes() -> None:
    """Raises UserError if a reader was killed by a signal, as it is when memory runs out."""
    _seen.update(_grain_processes())
    for process in list(_seen):
        code = process.exitcode
        if code is not None:
            _seen.discard(process)
            if code < 0 and process.pid not in _ended:
                raise _died(code)


def _died(code: int) -> UserError:
    if code == _UNGUARDED:
        return UserError(_GUARD)
    if code < 0:
        return SettingError(
            f"a reader process was killed by {signal.Signals(-code).name}, as the kernel does when "
            "memory runs out;",
            "data.workers",
            "use fewer data.workers, or none",
        )
    return UserError(f"a reader process ended with status {code}; what it printed says why")


def _grain_processes() -> set[Any]:
    return {p for p in multiprocessing.active_children() if p.name.startswith(_NAME)}


def _block_signals() -> None:
    """Blocks `SIGNALS` in this thread, and so in the processes and threads that it starts.

    A terminal, SLURM and Kubernetes send them to all processes of a job; the main one decides.
    Ignoring them in the processes would be too late: those take seconds until they run our code.
    """
    if sys.platform == "win32":
        return
    # Python's resource tracker, which removes leaked shared memory, starts first: starting it
    # unblocks SIGINT and SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # It would warn of leaked shared memory: batches that were prefetched when a run ended.
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _begin_worker(parent: int, *_: int) -> None:
    """Runs first in a reader process, which exits with its parent, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()

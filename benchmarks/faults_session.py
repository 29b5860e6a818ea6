"""One session of the training command, as faults.py watches and disturbs it.

A session is one execution of the command, in one or several processes.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Seconds after which a session hangs.
LIMIT = 300.0
POLL = 0.002
PHASES = ("imports", "compile", "steps", "evaluation", "save", "last save", "end")

INTRODUCTION = re.compile(r"^.* parameters; .* images\), .*$", re.MULTILINE)
CONTINUES = re.compile(r"^.* (?:continues|is finished) at step (\d+) of \d+$", re.MULTILINE)
DAMAGED = re.compile(r"^checkpoint \S+/(\d+) is damaged: ", re.MULTILINE)
TRAINED = re.compile(r"^step (\d+)/\d+  loss .*\n", re.MULTILINE)
EVALUATED = re.compile(r"^step (\d+)/\d+  test: .*\n", re.MULTILINE)
RESULT = re.compile(r"^test error: .*\n", re.MULTILINE)


class Unmet(Exception):  # noqa: N818  not an error of this program
    """A promise that was not kept; the message says which."""


def expect(kept: object, message: str) -> None:
    """Raises Unmet unless a promise is kept."""
    if not kept:
        raise Unmet(message)


class Session:
    """One execution of the command; its output is read whenever it is waited for.

    Args:
      commands: of each process; the first one speaks.
      environment: of all.
      directory: that they are started in.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], environment: dict[str, str], directory: Path
    ) -> None:
        self.began = time.monotonic()
        self.processes = [
            subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            for command in commands
        ]
        self._texts = {}
        for process in self.processes:
            for stream in (process.stdout, process.stderr):
                os.set_blocking(stream.fileno(), False)
                self._texts[stream] = b""

    @property
    def first(self) -> subprocess.Popen:
        """The process that speaks."""
        return self.processes[0]

    @property
    def out(self) -> str:
        """What the first process has printed."""
        return self._texts[self.first.stdout].decode(errors="replace")

    @property
    def errors(self) -> list[str]:
        """What each process has printed as errors."""
        return [self._texts[p.stderr].decode(errors="replace") for p in self.processes]

    @property
    def introduced(self) -> bool:
        """Whether the run has said what it trains."""
        return INTRODUCTION.search(self.out) is not None

    @property
    def trained(self) -> list[int]:
        """Steps of the records of training that were printed."""
        return [int(step) for step in TRAINED.findall(self.out)]

    @property
    def ended_well(self) -> bool:
        """Whether the result was printed, after everything was saved."""
        return RESULT.search(self.out) is not None

    def statuses(self) -> list[int | None]:
        """The exit status of each process, None while it runs."""
        return [process.poll() for process in self.processes]

    def running(self) -> bool:
        """Whether all processes run."""
        return set(self.statuses()) == {None}

    def read(self) -> None:
        """Reads what was printed."""
        for stream in self._texts:
            while not stream.closed:
                try:
                    read = os.read(stream.fileno(), 1 << 16)
                except BlockingIOError:
                    break
                self._texts[stream] += read
                if not read:
                    stream.close()

    def hang_up(self) -> None:
        """Closes the other ends of the output, as a terminal or a pipe that is gone."""
        for stream in self._texts:
            stream.close()

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Waits for a condition; returns whether it was met before a process ended."""
        deadline = time.monotonic() + seconds
        while True:
            self.read()
            if condition():
                return True
            if not self.running():
                self.read()
                return condition()
            self._in_time(deadline, seconds)
            time.sleep(POLL)

    def pause(self, seconds: float) -> bool:
        """Waits; returns whether all processes still run."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            self.read()
            time.sleep(POLL)
        return self.running()

    def end(self, seconds: float = LIMIT) -> list[int]:
        """Waits until all processes have ended; returns their statuses."""
        deadline = time.monotonic() + seconds
        while None in self.statuses():
            self.read()
            self._in_time(deadline, seconds)
            time.sleep(POLL)
        self.read()
        return [process.wait() for process in self.processes]

    def _in_time(self, deadline: float, seconds: float) -> None:
        """Raises Unmet after the deadline, when every process has printed where it hangs."""
        if time.monotonic() < deadline:
            return
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # Python's faulthandler prints all stacks
        time.sleep(1)
        self.read()
        raise Unmet(f"the session did not end within {seconds:.0f} s")

    def kill(self) -> None:
        """Kills all processes and what they have started."""
        for process in self.processes:
            for pid in [process.pid, *below(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.read()
        self.hang_up()

    def reach(self, phase: str, rng: random.Random, checkpoints: Path, about: "Typical") -> bool:
        """Waits for a random moment of a phase; returns whether it came before the end.

        Args:
          phase: one of PHASES.
          rng: chooses the moment.
          checkpoints: directory of the run's checkpoints.
          about: typical seconds and steps.
        """
        share, records = rng.random(), rng.randint(1, 4)
        last = str(about.steps)

        def saving(steps: str = "*") -> bool:
            return any(checkpoints.glob(f"{steps}.*tmp*")) and len(self.trained) >= records

        def evaluating() -> bool:
            newest = max(self.trained, default=1)
            due = -(-newest // about.eval_every) * about.eval_every
            return due - about.log_every < newest and str(due) not in EVALUATED.findall(self.out)

        waits: dict[str, tuple[Callable[[], bool], float]] = {
            "imports": (lambda: True, about.introduction),
            "compile": (lambda: self.introduced, about.compile),
            "steps": (lambda: len(self.trained) >= records, 0.05),
            "evaluation": (evaluating, 0.3),
            "save": (saving, 0.04),
            "last save": (lambda: saving(last), 0.06),
            "end": (lambda: last in EVALUATED.findall(self.out), 0.8),
        }
        condition, most = waits[phase]
        if phase == "last save":
            records = 0
        return self.until(condition) and self.pause(share * most)


class Typical:
    """Typical seconds and the steps of a training, to choose moments by.

    Attributes:
      introduction: seconds until a session says what it trains; measured again by each.
      compile: seconds from there to the first record.
      steps: of the whole run.
      eval_every: steps between evaluations.
      log_every: steps between records.
    """

    def __init__(self, steps: int, eval_every: int, log_every: int) -> None:
        self.introduction, self.compile = 2.0, 0.8
        self.steps, self.eval_every, self.log_every = steps, eval_every, log_every


def below(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *below(child)]
    return found


def readers(pid: int) -> list[int]:
    """The reader processes of a process."""
    found = []
    for child in below(pid):
        with contextlib.suppress(OSError):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
    return found


def is_running(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False

"""Kinds of faults that happen during a session; for faults.py."""

import contextlib
import dataclasses
import os
import re
import resource
import signal
import time
from collections.abc import Callable

from faults_disk import read_only
from faults_run import Run
from faults_session import PHASES, Session, below, expect, is_running, readers
from faults_training import LOG_EVERY, STEPS, records_of, result_of

WITH_READERS = (
    "--config.data.resident=false",
    "--config.data.in_memory=false",
    "--config.data.workers=1",
)
TRAINING = ("steps", "evaluation", "save")
AFTER_IMPORTS = PHASES[1:]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A fault that happens during a session.

    Attributes:
      act: causes the fault and waits until the session has ended as it must; raises Unmet.
      keeps: what must be on the disk afterwards: 'finished', the newest finished checkpoint or a
        later one; 'previous', also the one before; 'trained', the last step.
      phases: in which it is caused.
      flags: of the session.
      float64: whether it is caused in the training in float64 instead; None for both.
      processes: numbers of processes for which it is caused.
      mounts: whether it needs a disk image.
    """

    act: Callable[[Run, Session], None]
    keeps: str = "finished"
    phases: tuple[str, ...] = PHASES
    flags: tuple[str, ...] = ()
    float64: bool | None = False
    processes: tuple[int, ...] = (1,)
    mounts: bool = False


def _one_line(session: Session, pattern: str, process: int = 0) -> re.Match[str]:
    """The match of the only line that a process printed as an error."""
    error = session.errors[process]
    found = re.fullmatch(pattern, error.rstrip("\n"))
    expect(found is not None, f"the error is {error!r}, not a sentence like {pattern!r}")
    assert found is not None
    return found


def _failed(session: Session, pattern: str) -> None:
    """Waits until a session has ended in a sentence, or had nothing left to do."""
    (status,) = session.end()
    if status == 0 and session.ended_well:
        return
    expect(status == 2, f"the exit status is {status}, not 2")
    _one_line(session, f"error: {pattern}")


def _newest(run: Run) -> int:
    return max(run.saved(), default=0)


def _kill(run: Run, session: Session) -> None:
    for process in session.processes:
        children = below(process.pid) if run.rng.random() < 0.5 else []
        for pid in [process.pid, *children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    statuses = session.end()
    expect(set(statuses) <= {-signal.SIGKILL, 0}, f"the exit statuses are {statuses}")


def _kill_and_leave_readers(run: Run, session: Session) -> None:
    children = below(session.first.pid)
    session.first.kill()
    session.end()
    _all_gone(children)


def _all_gone(children: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [child for child in children if is_running(child)]:
        expect(time.monotonic() < deadline, f"the reader processes {left} have not ended")
        time.sleep(0.01)


def _stop(number: signal.Signals) -> Callable[[Run, Session], None]:
    """A signal to a process, or to its whole process group."""

    def act(run: Run, session: Session) -> None:
        process = run.rng.choice(session.processes)
        introduced = session.introduced
        send = os.killpg if run.rng.random() < 0.5 else os.kill
        with contextlib.suppress(ProcessLookupError):
            send(process.pid, number)
        _stopped(run, session, number, introduced)

    return act


def _stopped(
    run: Run, session: Session, number: signal.Signals, introduced: bool, hear: bool = True
) -> None:
    """Waits until a session that got a signal has ended as it must."""
    statuses = session.end()
    expect(len(set(statuses)) == 1, f"the exit statuses are {statuses}")
    status = statuses[0]
    if session.ended_well or not introduced:
        # Before a handler is set, or after it was removed, a signal has its usual effect.
        usual = {0, -number, 128 + number}
        expect(status in usual, f"the exit status is {status}, not one of {usual}")
    else:
        expect(status in (0, 128 + number), f"the exit status is {status}, not {128 + number}")
        expect(status != 0 or _newest(run) == STEPS, "it ended without a word")
    if status == 128 + number and hear and session.errors[0]:
        newest = _newest(run)
        when = f"at step {newest}, which is saved in {re.escape(str(run.workdir))}"
        when = f"({when}|before the first step)" if not introduced or newest == 0 else when
        _one_line(session, f"stopped by {number.name} {when}; run the same command again to .*")
    elif status == 128 + number and hear:
        expect(not introduced, "it stopped without a sentence")


def _ctrl_c_twice(run: Run, session: Session) -> None:
    for pause in (run.rng.uniform(0, 0.2), 0):
        with contextlib.suppress(ProcessLookupError):
            session.first.send_signal(signal.SIGINT)
        session.pause(pause)
    (status,) = session.end()
    usual = {0, 1, 130, -signal.SIGINT}
    expect(status in usual, f"the exit status is {status}, not one of {usual}")
    lines = session.errors[0].splitlines()
    expect(len(lines) <= 1, f"the error has {len(lines)} lines")


def _reader(number: signal.Signals, reason: str) -> Callable[[Run, Session], None]:
    def act(run: Run, session: Session) -> None:
        children, found = below(session.first.pid), readers(session.first.pid)
        expect(found, "there is no reader process")
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.rng.choice(found), number)
        _failed(session, f"{reason}.*is saved in {re.escape(str(run.workdir))}.*")
        _all_gone(children)

    return act


def _disk_full(run: Run, session: Session) -> None:
    run.disk.fill(run.rng.choice((0, 0, run.rng.randrange(1_500_000))))
    _failed(session, r".*No space left on device.*")


def _disk_full_for_a_while(run: Run, session: Session) -> None:
    run.disk.fill(0)
    session.pause(run.rng.uniform(0.05, 0.4))
    run.disk.empty()
    session.pause(run.rng.uniform(0, 0.2))
    trained, introduced = max(session.trained, default=0), session.introduced
    if session.running() and not session.errors[0]:
        session.first.send_signal(signal.SIGTERM)
    (status,) = session.end()
    if session.errors[0].startswith("error: "):  # it was full when the run had to save
        expect(status in (2, -signal.SIGTERM), f"the exit status is {status}, not 2")
        _one_line(session, r"error: .*No space left on device.*")
        return
    if status == -signal.SIGTERM and trained == STEPS and not session.ended_well:
        return  # the same, and the signal came before it could say so
    _stopped(run, session, signal.SIGTERM, introduced)
    newest = _newest(run)
    expect(newest >= trained, f"the newest checkpoint is of step {newest}, not of {trained}")


def _stop_now(run: Run, session: Session) -> None:
    """Checks that a session has continued, by stopping it."""
    introduced = session.introduced
    with contextlib.suppress(ProcessLookupError):
        session.first.send_signal(signal.SIGTERM)
    _stopped(run, session, signal.SIGTERM, introduced)


def _file_limit(run: Run, session: Session) -> None:
    limit = run.rng.randint(200, 9000)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(session.first.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _failed(session, r".*File too large.*")


def _read_only(run: Run, session: Session) -> None:
    run.workdir.mkdir(exist_ok=True)
    with read_only(run.workdir):
        _failed(session, r".*Read-only file system.*")


def _power(run: Run, session: Session) -> None:
    session.first.send_signal(signal.SIGSTOP)
    image = run.disk.copy()
    session.kill()
    run.disk.become(image)


def _moved(run: Run, session: Session) -> None:
    elsewhere = run.workdir.with_name(f"{run.workdir.name}.moved")
    while elsewhere.exists():
        elsewhere = elsewhere.with_name(f"{elsewhere.name}.moved")
    run.workdir.rename(elsewhere)
    (status,) = session.end()
    where = re.escape(str(run.workdir))
    if status != 0:
        expect(status == 2, f"the exit status is {status}, not 2")
        _one_line(session, f"error: .*(moved|No such file).*is saved in {where}.*")
    run.earlier |= records_of(elsewhere / "metrics.jsonl")
    # A record that cannot be written is lost, and those of later steps up to the saved one.
    written = max((step for split, step in run.earlier if split == "train"), default=0)
    run.excused |= {("train", n) for n in range(written + 1, _newest(run) + LOG_EVERY)}
    run.damaged = set()


def _hang_up(run: Run, session: Session) -> None:
    introduced = session.introduced
    session.hang_up()
    expect(session.pause(0.3) or session.statuses() == [0], "it ended when its output was closed")
    with contextlib.suppress(ProcessLookupError):
        session.first.send_signal(signal.SIGTERM)
    (status,) = session.end()
    if status == -signal.SIGTERM and introduced:  # the result was written, and said to nobody
        result = result_of(run.workdir)
        expect(result["step"] == STEPS, f"it ended before a result, with {status}")
        return
    _stopped(run, session, signal.SIGTERM, introduced, hear=False)


def _second_run(run: Run, session: Session) -> None:
    """Another session in the same workdir while the first one is suspended."""
    session.first.send_signal(signal.SIGSTOP)
    other = run.training.session(run.workdir)
    try:
        _failed(other, rf".* is in use by a run that process {session.first.pid} on .*")
    finally:
        other.kill()
        session.first.send_signal(signal.SIGCONT)
    session.pause(0.05)
    _stop_now(run, session)


def _kill_one(run: Run, session: Session) -> None:
    lost = run.rng.randrange(len(session.processes))
    session.processes[lost].kill()
    statuses = session.end()
    for i, status in enumerate(statuses):
        if i != lost and status != 0:
            expect(status == 1, f"process {i} ended with {status}, not 1")
            _one_line(session, f"error: process {lost} of 2 on .* is lost: .*", i)


KINDS = {
    "kill": Kind(_kill, float64=None, processes=(1, 2)),
    "kill beside readers": Kind(_kill_and_leave_readers, phases=TRAINING, flags=WITH_READERS),
    "SIGTERM": Kind(_stop(signal.SIGTERM), "trained", float64=None),
    "SIGINT": Kind(_stop(signal.SIGINT), "trained"),
    "SIGHUP": Kind(_stop(signal.SIGHUP), "trained"),
    "SIGUSR1": Kind(_stop(signal.SIGUSR1), "trained"),
    "second Ctrl-C": Kind(_ctrl_c_twice),
    "reader killed": Kind(
        _reader(signal.SIGKILL, "a reader process was killed by SIGKILL"),
        "trained",
        ("steps",),
        WITH_READERS,
    ),
    "reader frozen": Kind(
        _reader(signal.SIGSTOP, "nothing was read within data.timeout=20"),
        "trained",
        ("steps",),
        (*WITH_READERS, "--config.data.timeout=20"),
    ),
    "disk full": Kind(_disk_full, mounts=True),
    "disk full for a while": Kind(
        _disk_full_for_a_while,
        phases=AFTER_IMPORTS,
        flags=("--config.checkpoint.on_failure=continue",),
        mounts=True,
    ),
    "limit of a file's size": Kind(_file_limit),
    "read-only workdir": Kind(_read_only, mounts=True),
    "power failure": Kind(_power, "previous", mounts=True),
    "workdir moved in a run": Kind(_moved, "trained", TRAINING),
    "output closed": Kind(_hang_up, "trained"),
    "second run": Kind(_second_run, "trained", TRAINING),
    "stop of two processes": Kind(
        _stop(signal.SIGTERM), "trained", TRAINING, float64=True, processes=(2,)
    ),
    "one of two killed": Kind(_kill_one, phases=TRAINING, float64=True, processes=(2,)),
}

"""Whether nothing that was trained is lost: faults by the hundred, each for real.

    python benchmarks/faults.py --faults=100 --seed=0

A tiny network is trained on digits without faults. Then the same command is disturbed by one fault
after another (kills, signals, damaged files, full disks, power failures, changes of devices), each
followed by the same command again. After each fault this compares the newest checkpoint, the
records and what the next session says with the run without faults; at the end of each run also its
result. On the same devices, bits must be equal; on others, in float64, the examples of every step,
and parameters to 1e-8 of each leaf's norm. docs/reliability.md lists what is promised.

Appends to results/faults.json. The exit status is 1 if a promise was not kept.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from faults_disk import Disk, mounting
from faults_files import CHANGES
from faults_kinds import KINDS, Kind
from faults_run import Run
from faults_session import PHASES, Session, Unmet, expect
from faults_tally import Tally
from faults_training import Training

ROOT = Path(__file__).parent.parent
FAULTS_OF_A_RUN = 10
# The last phases end a run, so they come late.
WEIGHTS = dict(zip(PHASES, (1.0, 1.0, 3.0, 1.5, 3.0, 0.3, 0.3), strict=True))
FLOAT64 = {name for table in (KINDS, CHANGES) for name, of in table.items() if of.float64}


class Chooser:
    """Chooses the kinds that were tried least among those that can be caused.

    Args:
      kinds: the names of those to cause.
      tally: how often each was tried, and which are not possible here.
    """

    def __init__(self, kinds: list[str], tally: Tally) -> None:
        self._kinds, self._tally = kinds, tally
        self._chosen = {name: tally.tried(name) for name in [*KINDS, *CHANGES]}

    def float64(self, rng: random.Random) -> bool:
        """Whether the next run is one in float64."""
        return self._least(self._possible(self._kinds), rng) in FLOAT64

    def change(self, run: Run) -> str | None:
        """A change before the next session, if any."""
        found = [name for name in self._kinds if self._fits(name, run)]
        if run.training.float64 and not found:
            found = [name for name in CHANGES if self._fits(name, run)]
        found = self._possible(found)
        if not found or (run.rng.random() < 0.4 and not run.training.float64):
            return None
        chosen = self._least(found, run.rng)
        self._chosen[chosen] += 1
        return chosen

    def kind(self, run: Run) -> str:
        """A fault during the next session; a kill if none was asked for."""

        def fits(kind: Kind) -> bool:
            there = kind.float64 is None or kind.float64 == run.training.float64
            return there and run.on.processes in kind.processes

        found = [name for name in self._kinds if name in KINDS and fits(KINDS[name])]
        found = self._possible(found)
        chosen = self._least(found, run.rng) if found else "kill"
        self._chosen[chosen] += 1
        return chosen

    def _fits(self, name: str, run: Run) -> bool:
        change = CHANGES.get(name)
        if change is None or change.float64 != run.training.float64:
            return False
        return len(run.saved()) >= change.least

    def _possible(self, kinds: list[str]) -> list[str]:
        return [name for name in kinds if name not in self._tally.impossible]

    def _least(self, kinds: list[str], rng: random.Random) -> str:
        return min(kinds, key=lambda name: (self._chosen[name], rng.random()))


@contextlib.contextmanager
def started(run: Run, *flags: str) -> Iterator[Session]:
    """A context with the next session of a run, which is killed at its end if it still runs."""
    session = run.start(*flags)
    try:
        yield session
    finally:
        session.kill()
        run.keep_output(session)
        run.disk.empty()


def disturb(run: Run, name: str) -> tuple[bool, bool]:
    """One session with a fault.

    Returns:
      Whether the fault was caused before the session had ended; whether it had said where it
      continues.
    """
    kind = KINDS[name]
    phases = [phase for phase in kind.phases if not (run.damaged and phase == "imports")]
    phase = run.rng.choices(phases, [WEIGHTS[phase] for phase in phases])[0]
    with started(run, *kind.flags) as session:
        in_time = session.reach(phase, run.rng, run.checkpoints, run.training.typical)
        if in_time and run.damaged:  # a session that is killed before it names them cannot
            in_time = session.until(lambda: bool(session.trained)) and session.running()
            run.note(session)
        if not in_time:
            complete(run, session)
            return False, True
        run.moment += f"{name} ({phase})"
        before, trained = run.saved(), max(session.trained, default=0)
        kind.act(run, session)
        said = run.note(session)
    least = max(before, default=0)
    if kind.keeps == "previous":
        least = before[1] if len(before) > 1 else 0
    elif kind.keeps == "trained":
        least = max(least, trained)
    run.check(least)
    return True, said


def complete(run: Run, session: Session) -> None:
    """Waits for the end of a session without a fault, and compares its run."""
    run.moment += "a session without a fault"
    statuses = session.end()
    said = run.note(session)
    expect(set(statuses) == {0}, f"without a fault, the exit statuses are {statuses}")
    expect(said, "it ended without a word")
    run.finish()


def one_run(run: Run, chooser: Chooser, most: int, tally: Tally) -> None:
    """Trains with faults until the run is finished; counts them.

    Args:
      run: to begin.
      chooser: of faults.
      most: number of faults.
      tally: counts them.
    """
    pending: list[str] = []
    count = 0
    try:
        while count < most:
            change, run.moment = chooser.change(run), ""
            if change is not None:
                run.moment = f"{change}; "
                pending.append(change)
                count += 1
                CHANGES[change].act(run)
            name = chooser.kind(run)
            if count >= most:
                break
            pending.append(name)
            caused, said = disturb(run, name)
            run.flags = ()
            count += caused
            if not caused:
                pending.pop()
                tally.passed(pending)
                return
            if said:
                tally.passed(pending[:-1])
                pending = pending[-1:]
            tally.caused(run.moment)
        run.moment = ""
        with started(run) as session:
            complete(run, session)
        tally.passed(pending)
    except Unmet as unmet:
        tally.failed(pending or ["no fault"], str(unmet), run)


def main() -> int:
    """Causes faults, writes the results and prints them."""
    first, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{first}\n\n{more}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20, metavar="N", help="Number of faults.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the first run; the next ones count from it."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "faults.json",
        metavar="FILE",
        help="The file that counts are added to (default: %(default)s).",
    )
    parser.add_argument(
        "--kinds",
        default="",
        metavar="NAME,NAME",
        help=f"Kinds of faults to cause (default: all). They are: {', '.join([*KINDS, *CHANGES])}. "
        "A session that none of them ends is killed.",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="A directory for data, compiled programs and the workdirs of runs that failed, which "
        "are kept (default: a temporary one).",
    )
    arguments = parser.parse_args()
    names = [*KINDS, *CHANGES]
    kinds = [name for name in arguments.kinds.split(",") if name] or names
    for name in kinds:
        if name not in names:
            parser.error(f"there is no kind {name!r}; they are {', '.join(names)}")
    # What is ignored in the background or under nohup would be ignored by what is started here too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if arguments.workdir is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            root = arguments.workdir.absolute()
            root.mkdir(parents=True, exist_ok=True)
        tally = Tally(arguments.out, root, arguments.seed, keep=arguments.workdir is not None)
        with contextlib.suppress(KeyboardInterrupt):
            causes(root, kinds, arguments.faults, arguments.seed, tally)
    tally.write()
    print(tally.table())
    return 1 if tally.failures else 0


def causes(root: Path, kinds: list[str], faults: int, seed: int, tally: Tally) -> None:
    """Causes a number of faults in several runs."""
    scratch = root / f"scratch{os.getpid()}"
    scratch.mkdir()
    try:
        reason = mounting(scratch)
        for name in kinds:
            if reason and name in KINDS and KINDS[name].mounts:
                tally.impossible[name] = reason
            if name in CHANGES and CHANGES[name].processors > len(os.sched_getaffinity(0)):
                tally.impossible[name] = "it needs two processors"
        chooser, trainings, number = Chooser(kinds, tally), {}, 0
        while tally.count < faults:
            rng = random.Random(seed + number)
            float64 = chooser.float64(rng)
            if float64 not in trainings:
                began = time.monotonic()
                trainings[float64] = Training(root, scratch, float64)
                trainings[float64].measure()
                tally.say(f"the run without faults took {time.monotonic() - began:.0f} s")
            tally.seed = seed + number
            with Disk(scratch, mounted=not reason) as disk:
                run = Run(trainings[float64], disk, rng)
                most = min(FAULTS_OF_A_RUN, faults - tally.count)
                one_run(run, chooser, most, tally)
            number += 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

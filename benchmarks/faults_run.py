"""A run that faults.py disturbs, and what must be true after each fault and at the end."""

import random
from pathlib import Path

from faults_disk import Disk
from faults_session import CONTINUES, DAMAGED, Session, expect
from faults_training import (
    EVAL_EVERY,
    EVERY,
    LOG_EVERY,
    STEPS,
    Devices,
    Records,
    Training,
    records_of,
    result_of,
)

from resnet_flax.training.checkpoint_files import steps_in


class Run:
    """One workdir, its faults so far, and what they excuse.

    Args:
      training: what is trained.
      disk: where.
      rng: makes all choices.

    Attributes:
      workdir: of the run, which a fault may move.
      flags: of the next session, besides the training's.
      on: what the next session is started on.
      damaged: steps of checkpoints that a fault has damaged and no session has named yet.
      excused: records that a fault has removed.
      earlier: records in a workdir that a fault has moved away.
      moment: the newest fault, for a failure's description.
      outputs: what the newest session printed, and its processes as errors.
    """

    def __init__(self, training: Training, disk: Disk, rng: random.Random) -> None:
        self.training, self.disk, self.rng = training, disk, rng
        self.workdir = disk.place / "run"
        self.flags: tuple[str, ...] = ()
        self.on = Devices()
        self.damaged: set[int] = set()
        self.excused: set[tuple[str, int]] = set()
        self.earlier: Records = {}
        self.moment, self.outputs = "", list[str]()
        self._continues_from = 0
        self._said: tuple[Session, bool] | None = None

    @property
    def checkpoints(self) -> Path:
        """Their directory."""
        return self.workdir / "checkpoints"

    def saved(self) -> list[int]:
        """Steps of the finished checkpoints that no fault has damaged, the newest first."""
        return [step for step in steps_in(self.checkpoints) if step not in self.damaged]

    def start(self, *flags: str) -> Session:
        """Starts a session; it has to continue from the newest checkpoint that is undamaged."""
        self._continues_from = max(self.saved(), default=0)
        return self.training.session(self.workdir, (EVERY, *self.flags, *flags), self.on)

    def note(self, session: Session) -> bool:
        """Checks what a session printed; returns whether it said where it continues."""
        session.read()
        text = session.out + "".join(session.errors)
        expect("Traceback (most recent call last)" not in text, "a traceback was printed")
        if self._said is None or self._said != (session, True):
            self._said = session, self._continued(session)
        return self._said[1]

    def keep_output(self, session: Session) -> None:
        """Keeps a session's output."""
        self.outputs = [session.out, *session.errors]

    def _continued(self, session: Session) -> bool:
        """Whether a session said where it continues.

        Raises:
          Unmet: it was another step than that of the newest undamaged checkpoint, or it did not
            name a damaged one.
        """
        said, expected = CONTINUES.search(session.out), self._continues_from
        if said is None:
            begun = session.trained or session.ended_well
            expect(not (begun and expected), f"it did not say that it continues at step {expected}")
            expect(not (begun and self.damaged), "it began again without naming what is damaged")
            return bool(begun)
        expect(
            int(said[1]) == expected,
            f"it continued at step {said[1]}, not at {expected}, the newest undamaged checkpoint",
        )
        named = {int(step) for step in DAMAGED.findall(session.out)}
        newer = {step for step in self.damaged if step > expected}
        expect(named == newer, f"it named the damaged checkpoints {named}, not {newer}")
        self.damaged -= newer
        return True

    def check(self, least: int) -> None:
        """Checks what is on the disk after a session.

        Args:
          least: there must be an undamaged checkpoint of this step or a later one, if not 0.

        Raises:
          Unmet: there is not, or it or a record is not that of the run without faults.
        """
        steps = self.saved()
        newest = max(steps, default=0)
        expect(newest >= least, f"the newest checkpoint is of step {newest}, not of {least}")
        if steps:
            self.training.same_state(self.checkpoints / str(newest))
        self.records(newest)

    def records(self, until: int) -> Records:
        """The records, all equal to those of the run without faults and none missing.

        Args:
          until: the step of the newest checkpoint. An evaluation of that step is repeated, so its
            record may be missing.
        """
        found = records_of(self.workdir / "metrics.jsonl")
        everything = {**self.earlier, **found}
        for key, record in everything.items():
            expected = self.training.reference.records.get(key)
            self.training.same(record, expected, f"the record of {key}")
        last = until == STEPS
        due = {("train", n) for n in range(LOG_EVERY, until + 1, LOG_EVERY)}
        due |= {("train", STEPS)} if last else set()
        due |= {("test", n) for n in range(EVAL_EVERY, until, EVAL_EVERY)}
        missing = due - everything.keys() - self.excused
        expect(not missing, f"records up to step {until} are missing: {sorted(missing)}")
        return everything

    def finish(self) -> None:
        """Checks a finished run."""
        steps = self.saved()
        expect(steps[:1] == [STEPS], f"the finished run has the checkpoints {steps}")
        self.training.same_state(self.checkpoints / str(STEPS))
        missing = self.training.reference.records.keys() - self.records(STEPS).keys()
        expect(missing <= self.excused, f"records are missing: {sorted(missing - self.excused)}")
        self.training.same(
            result_of(self.workdir), self.training.reference.result, "what result.json says"
        )
        if self.training.float64:
            self.training.same_examples(self.workdir)

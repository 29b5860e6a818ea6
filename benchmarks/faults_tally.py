"""The counts of faults.py, in its file and on the terminal."""

import datetime
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import read_json, write_json

# Failures whose output is kept in the file.
MOST_FAILURES = 20
SECONDS, PROCESSOR = "seconds", "processor_seconds"


def _without_places(text: str, run: Any) -> str:
    """A text without the directories of this machine, of which tracebacks have some."""
    python = str(Path(os.__file__).parent)
    places = {str(run.disk.place): "DIR", f"{Path(__file__).parents[1]}/": "", f"{python}/": ""}
    for place, name in places.items():
        text = text.replace(place, name)
    return text


class Tally:
    """Counts faults by kind, together with those that the file has of earlier times.

    Args:
      file: of JSON, written after every fault.
      root: a directory for the workdirs of runs that failed.
      seed: of the first run.
      keep: whether to keep those workdirs.

    Attributes:
      impossible: why kinds of faults cannot be caused here.
      seed: of the current run.
      failures: promises that were not kept this time.
      count: the number of faults this time.
    """

    def __init__(self, file: Path, root: Path, seed: int, *, keep: bool) -> None:
        self._file, self._root, self._keep = file, root, keep
        self._began, self._last = time.monotonic(), time.monotonic()
        self.impossible: dict[str, str] = {}
        self.seed, self.count = seed, 0
        self.failures: list[dict[str, Any]] = []
        self._content = read_json(file) or {"kinds": {}, "failures": [], "sessions": []}
        self._session = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seeds": [seed],
            "faults": 0,
            SECONDS: 0.0,
            PROCESSOR: 0.0,
            **provenance(),
        }
        self._content["sessions"].append(self._session)

    def tried(self, kind: str) -> int:
        """How often a kind of fault was caused."""
        return self._kind(kind)["tried"] if kind in self._content["kinds"] else 0

    def say(self, text: str) -> None:
        """Prints a line of at most 80 characters."""
        print(text if len(text) <= 80 else f"{text[:77]}...", flush=True)

    def caused(self, moment: str) -> None:
        """Prints a fault after its checks."""
        now = time.monotonic()
        self.say(f"seed {self.seed}: {now - self._last:4.1f} s  {moment}")
        self._last = now

    def passed(self, kinds: list[str]) -> None:
        """Counts faults after which every promise was kept."""
        for kind in kinds:
            self._count(kind, "passed")
        self.write()

    def failed(self, kinds: list[str], message: str, run: Any) -> None:
        """Counts faults after which a promise was not kept, and describes it."""
        for kind in kinds:
            self._count(kind, "failed")
        failure = {
            "seed": self.seed,
            "kinds": kinds,
            "moment": run.moment,
            "promise": _without_places(message, run),
            "output": [_without_places(text[-1000:], run) for text in run.outputs],
        }
        self.failures.append(failure)
        self._content["failures"] = [*self._content["failures"], failure][:MOST_FAILURES]
        self.say(f"FAILED after {', '.join(kinds)}; seed {self.seed}:")
        self.say(f"  {message}")
        if self._keep:
            kept = self._root / "failures" / f"{self.seed}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(run.disk.place, kept, ignore=shutil.ignore_patterns("lost+found"))
            (kept / "output").write_text("\n".join(run.outputs))
            self.say(f"  its workdir is kept in {kept}")
        self.write()

    def write(self) -> None:
        """Writes the file."""
        for kind, reason in self.impossible.items():
            self._kind(kind)["not_possible_here"] = reason
        total = self._content["kinds"].values()
        self._content["faults"] = sum(row["tried"] for row in total)
        self._content["passed"] = sum(row["passed"] for row in total)
        self._session["faults"] = self.count
        self._session["seeds"] = [self._session["seeds"][0], self.seed]
        self._session[SECONDS] = round(time.monotonic() - self._began, 1)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._session[PROCESSOR] = round(used.ru_utime + used.ru_stime, 1)
        write_json(self._file, self._content)

    def table(self) -> str:
        """The counts of all times, with a row for each kind."""
        lines = [f"{'kind of fault':<28}{'tried':>7}{'passed':>8}{'failed':>8}"]
        rows = self._content["kinds"].items()
        for kind, row in rows:
            why = row.get("not_possible_here", "")
            note = f"  not possible here: {why}" if why and not row["tried"] else ""
            counts = f"{row['tried']:>7}{row['passed']:>8}{row['failed']:>8}"
            lines.append(f"{kind:<28}{note or counts}")
        counts = (sum(row[name] for _, row in rows) for name in ("tried", "passed", "failed"))
        lines.append(f"{'all':<28}{next(counts):>7}{next(counts):>8}{next(counts):>8}")
        each = [self._session[name] / max(1, self.count) for name in (SECONDS, PROCESSOR)]
        lines.append(
            f"{self.count} faults this time: {each[0]:.1f} s each, {each[1]:.1f} s of processors"
        )
        return "\n".join(lines)

    def _kind(self, kind: str) -> dict[str, Any]:
        return self._content["kinds"].setdefault(kind, {"tried": 0, "passed": 0, "failed": 0})

    def _count(self, kind: str, how: str) -> None:
        row = self._kind(kind)
        row["tried"] += 1
        row[how] += 1
        self.count += 1

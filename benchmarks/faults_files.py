"""Kinds of faults between two sessions: damaged files, and changes of devices; for faults.py."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from faults_run import Run
from faults_session import expect
from faults_training import Devices, records_of

from resnet_flax.training.checkpoint_files import SUMS


@dataclasses.dataclass(frozen=True)
class Change:
    """A fault between two sessions.

    Attributes:
      act: causes it.
      float64: whether it is caused in the training in float64 instead.
      least: the number of undamaged checkpoints that it needs.
      processors: the number of processors that it needs.
    """

    act: Callable[[Run], None]
    float64: bool = False
    least: int = 0
    processors: int = 1


def _files(checkpoint: Path) -> list[Path]:
    """The files whose bytes are verified."""
    return sorted(checkpoint / name for name in json.loads((checkpoint / SUMS).read_bytes()))


def _flip(path: Path, run: Run) -> None:
    content = bytearray(path.read_bytes())
    content[run.rng.randrange(len(content))] ^= 1 << run.rng.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, run: Run) -> None:
    os.truncate(path, run.rng.randrange(path.stat().st_size))


def _zero(path: Path, run: Run) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _damage(how: Callable[[Path, Run], None]) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        newest = run.saved()[0]
        checkpoint = run.checkpoints / str(newest)
        how(run.rng.choice([*_files(checkpoint), checkpoint / SUMS]), run)
        run.damaged.add(newest)

    return act


def _delete(run: Run) -> None:
    newest = run.saved()[0]
    run.rng.choice(_files(run.checkpoints / str(newest))).unlink()
    run.damaged.add(newest)


def _all_damaged(run: Run) -> None:
    """Every checkpoint is damaged: the run is refused, and then they are repaired."""
    aside = run.workdir.with_name(f"{run.workdir.name}.aside")
    shutil.copytree(run.checkpoints, aside)
    steps = run.saved()
    for step in steps:
        checkpoint = run.checkpoints / str(step)
        _flip(run.rng.choice([*_files(checkpoint), checkpoint / SUMS]), run)
    session = run.start()
    try:
        (status,) = session.end()
        run.note(session)
        error = session.errors[0]
        expect(status == 2, f"with damaged checkpoints only, the exit status is {status}, not 2")
        named = [int(step) for step in re.findall(r"/(\d+) is damaged: ", error)]
        expect(named == steps, f"it named the damaged checkpoints {named}, not {steps}")
        expect("no undamaged one is left" in error, f"the error is {error!r}")
        expect(run.saved() == steps, "it moved damaged checkpoints, and none is left")
    finally:
        session.kill()
    shutil.rmtree(run.checkpoints)
    aside.rename(run.checkpoints)


def _metrics(run: Run) -> None:
    """Damages metrics.jsonl: its end as by a crash, or a line within."""
    path = run.workdir / "metrics.jsonl"
    before = records_of(path)
    content = path.read_bytes() if path.exists() else b""  # a moved workdir may have none yet
    kind = run.rng.choice(("torn", "zeros", "garbage", "cut") if before else ("zeros",))
    if kind == "torn":
        content += content[: run.rng.randrange(1, 60)]
    elif kind == "zeros":
        content += bytes(run.rng.randrange(1, 5000))
    elif kind == "cut":
        content = content[: run.rng.randrange(len(content))]
    else:
        lines = content.split(b"\n")
        chosen = run.rng.randrange(len(lines) - 1)
        lines[chosen] = b"{\xff" + lines[chosen][2:]
        content = b"\n".join(lines)
    path.write_bytes(content)
    run.excused |= before.keys() - records_of(path).keys()


def _json(run: Run) -> None:
    """Other programs write over the files of JSON."""
    for name in ("config.json", "sessions.json", "result.json"):
        content = run.rng.choice((b"", b"[1, 2]", b"7", b"\0\0", b"{", b'{"step": 80}'))
        (run.workdir / name).write_bytes(content)


def _renamed(run: Run) -> None:
    new = run.workdir.with_name(f"run{run.rng.randrange(10**6)}")
    run.workdir.rename(new)
    run.workdir = new


def _workers(run: Run) -> None:
    number = run.rng.choice((1, 2))
    run.flags = (f"--config.data.workers={number}", "--config.data.in_memory=false")


def _in_memory(run: Run) -> None:
    run.flags = ("--config.data.in_memory=true",)


def _devices(run: Run) -> None:
    before = run.on.devices if run.on.processes == 1 else 0
    run.on = Devices(run.rng.choice([n for n in (1, 2, 8) if n != before]))


def _processes(run: Run) -> None:
    run.on = Devices(1, 3 - run.on.processes)


def _resident(run: Run) -> None:
    run.flags = ("--config.data.resident=true", "--config.steps_per_dispatch=4")


CHANGES = {
    "bit flipped": Change(_damage(_flip), least=2),
    "file truncated": Change(_damage(_truncate), least=2),
    "file of zeros": Change(_damage(_zero), least=2),
    "file deleted": Change(_delete, least=2),
    "all damaged": Change(_all_damaged, least=1),
    "metrics.jsonl damaged": Change(_metrics, least=1),
    "JSON damaged": Change(_json, least=1),
    "workdir renamed": Change(_renamed, least=1),
    "data.workers changed": Change(_workers),
    "data.in_memory changed": Change(_in_memory),
    "data.resident changed": Change(_resident, float64=True),
    "devices changed": Change(_devices, float64=True, processors=2),
    "processes changed": Change(_processes, float64=True, processors=2),
}

"""Where measurements go: the terminal, metrics.jsonl and TensorBoard event files."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from resnet_flax.runtime import storage
from resnet_flax.runtime.progress import Progress

Record = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each (`split`, `step`) once, crashes or not.

    What was written after the step that a run goes on from is dropped on opening, as is a line
    that a crash tore.

    Args:
      path: of the file; made where it is not there.
      start: the step that the run continues from.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        self._written = {(record["split"], record["step"]) for record in kept}
        storage.write(path, "".join(json.dumps(record) + "\n" for record in kept))
        # Each line is written at once, and survives a kill; what a full disk took no part of stays
        # in no buffer.
        self._file = path.open("ab", buffering=0)

    def has(self, split: str, step: int) -> bool:
        """Whether there is a record of this split and step."""
        return (split, step) in self._written

    def write(self, record: Record) -> None:
        """Appends a record, which has `split` and `step`."""
        line = (json.dumps(record) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:  # a part of it may find room
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, self._file.name) from error
        self._written.add((record["split"], record["step"]))

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class EventFile:
    """TensorBoard's form of the same records.

    Each is in the file when `write` returns: tensorboardX's `SummaryWriter` has a thread write
    them, which a process that is killed takes along.

    Args:
      directory: made where it is not there; gets one file more.
      start: the step that the run continues from: TensorBoard drops what is of later ones.
    """

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        storage.make_directory(directory)
        self._event = Event
        self._file = EventsWriter(str(directory / "events"))
        begun = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begun))
        self._file.flush()
        storage.sync_directory(directory)

    def write(self, record: Record) -> None:
        """Appends the numbers of a record."""
        from tensorboardX.summary import scalar

        for name, value in record.items():
            if name not in ("split", "step"):
                summary = scalar(f"{record['split']}/{name}", value)
                event = self._event(wall_time=time.time(), step=record["step"], summary=summary)
                self._file.write_event(event)
        self._file.flush()

    def sync(self) -> None:
        """Returns when what was written is on the disk, as tensorboardX's `flush` does."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; none where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if isinstance(record, dict) and {"split", "step", "loss", "error"} <= set(record):
            records.append(record)
    return records


class Terminal:
    """A progress bar where the output is a terminal, plain lines where it is none.

    Args:
      total: steps of the run.
      start: the step it goes on from.
      bar: whether a bar is wanted.
      file: written to; where it cannot be, that is noted once in `log` and the run continues.
      log: see there.
    """

    def __init__(
        self,
        total: int,
        start: int,
        bar: bool,
        file: TextIO | None = None,
        log: Path | None = None,
    ) -> None:
        self._total = total
        self._progress = Progress(file, wanted=bar, log=log)
        self._train = self._progress.add("train", total, start, "compiling")
        self._eval = self._progress.add("eval")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._progress.say(text)

    def trained(self, step: int, record: Record | None, seconds_left: float | None) -> None:
        """Shows that a step is done, and the newest record of training where there is one."""
        text = "" if record is None else describe(record)
        if self._progress.shown:
            keep = record is None and seconds_left is not None  # nothing to replace the old text
            self._train.update(step, text=None if keep else text)
        elif text:
            left = "" if seconds_left is None else f"  {_duration(seconds_left)} left"
            self.say(f"step {step}/{self._total}  {text}{left}")

    def evaluating(self, batch: int, batches: int) -> None:
        """Shows how far an evaluation is."""
        if batch < batches:
            self._eval.update(batch, batches)
        else:
            self._eval.hide()

    def evaluated(self, step: int, record: Record) -> None:
        """Shows an evaluation's result."""
        self.say(f"step {step}/{self._total}  {record['split']}: {describe(record)}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._progress.close()


def describe(record: Record) -> str:
    """Loss, error rate and speed of a record, in a form of constant width."""
    text = f"loss {record['loss']:.4f}  error {100 * record['error']:5.2f} %"
    if "images_per_second" in record:
        text += f"  {record['images_per_second']:,.0f} img/s"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Writers:
    """All of the above, and TensorBoard, as one context.

    Args:
      workdir: where metrics.jsonl and the event files go.
      start: the step that the run continues from.
      total: steps of the run.
      tensorboard: write event files.
      bar: show a bar where the output is a terminal.
      silent: write and say nothing, as every process but the first.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        total: int,
        *,
        tensorboard: bool,
        bar: bool,
        silent: bool = False,
    ) -> None:
        self._files: list[MetricsFile | EventFile] = []
        self._metrics: MetricsFile | None = None
        self._nowhere = open(os.devnull, "w") if silent else None  # noqa: SIM115  closed on exit
        if not silent:
            self._metrics = MetricsFile(workdir / "metrics.jsonl", start)
            self._files.append(self._metrics)
        if tensorboard and not silent:
            self._files.append(EventFile(workdir / "tensorboard", start))
        self.terminal = Terminal(total, start, bar, self._nowhere, workdir / "terminal.log")

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_: object) -> None:
        self.terminal.close()
        for file in (*self._files, self._nowhere):
            if file is not None:
                # What it could not write was raised when it was written.
                with contextlib.suppress(OSError):
                    file.close()

    def has(self, split: str, step: int) -> bool:
        """Whether there is a record of this split and step already."""
        return self._metrics is not None and self._metrics.has(split, step)

    def write(self, record: Record) -> None:
        """To metrics.jsonl and TensorBoard."""
        for file in self._files:
            file.write(record)

    def sync(self) -> None:
        """Returns when all records so far are on the disk."""
        for file in self._files:
            file.sync()

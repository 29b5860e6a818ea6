"""Outputs of measurements: the terminal, metrics.jsonl and TensorBoard event files."""

import contextlib
import errno
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from resnet_flax.runtime import storage
from resnet_flax.runtime.progress import Progress

Record = dict[str, Any]
# What every record has.
_NEEDED = {"split": str, "step": int, "loss": float | int}


class MetricsFile(storage.AppendedFile):
    """metrics.jsonl: one JSON object per line, each (`split`, `step`) once, even after crashes.

    Opening it drops records after the step that a run continues from, and a line that a crash left
    incomplete.

    Args:
      path: of the file; created if missing.
      start: the step that the run continues from.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        self._written = {(record["split"], record["step"]) for record in kept}
        storage.write(path, "".join(json.dumps(record) + "\n" for record in kept))
        super().__init__(path)

    def has(self, split: str, step: int) -> bool:
        """Whether there is, or will be, a record of this split and step."""
        return (split, step) in self._written

    def write(self, record: Record) -> None:
        """Appends a record, which has `split` and `step`."""
        self._written.add((record["split"], record["step"]))
        self.append((json.dumps(record) + "\n").encode())


class EventFile(storage.AppendedFile):
    """The same records as a TensorBoard event file.

    tensorboardX's `SummaryWriter` writes in a thread, and loses records if the process is killed.

    Args:
      directory: created if missing; gets a new file.
      start: the step that the run continues from; TensorBoard drops records of later steps.
    """

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        storage.make_directory(directory)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with storage.naming(directory / name):
            super().__init__(directory / name)
        self._event = Event
        begun = SessionLog(status=SessionLog.START)
        self.append(self._entry(file_version="brain.Event:2"))
        self.append(self._entry(step=start + 1, session_log=begun))
        storage.sync_directory(directory)

    def write(self, record: Record) -> None:
        """Appends the numbers of a record, and nothing else that a metric may be."""
        from tensorboardX.summary import scalar

        entry = b""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                summary = scalar(f"{record['split']}/{name}", value)
                entry += self._entry(step=record["step"], summary=summary)
        self.append(entry)

    def _entry(self, **content: Any) -> bytes:
        """An event as TensorFlow's record format has it: length, data, and a checksum of each."""
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        return length + next(checksums) + data + next(checksums)


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; empty if there is no file."""
    if not storage.exists(path):
        return []
    records = []
    for line in storage.read(path).split(b"\n"):
        # A crash may leave a line incomplete, and zeros in its place on some file systems.
        try:
            record = json.loads(line.strip(b"\0").decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(
            isinstance(record.get(name), kind) for name, kind in _NEEDED.items()
        ):
            records.append(record)
    return records


class Terminal:
    """A progress bar if the output is a terminal, otherwise plain lines.

    Args:
      total: steps of the run.
      start: the step that the run continues from.
      bar: whether to show a bar.
      file: output; if a write fails, that is recorded once in `log` and the run continues.
      log: file for such a failure.
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
        """Prints a line."""
        self._progress.say(text)

    def trained(self, step: int, record: Record | None, seconds_left: float | None) -> None:
        """Shows that a step is done, and the newest record of training if there is one."""
        text = "" if record is None else describe(record)
        if self._progress.shown:
            keep = record is None and seconds_left is not None  # there is no new text
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
    """Loss, error rate (of a classifier) and speed of a record, as text of constant width."""
    text = f"loss {record['loss']:.4f}"
    if "error" in record:
        text += f"  error {100 * record['error']:5.2f} %"
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
      bar: show a bar if the output is a terminal.
      silent: write and print nothing, for every process but the first.
      patient: keep records that cannot be written, as on a full disk, and write them later.
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
        patient: bool = False,
    ) -> None:
        self._patient = patient
        self._unwritten: set[Path] = set()  # files of which records wait
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
                # A failed write has already raised.
                with contextlib.suppress(OSError):
                    file.close()

    def has(self, split: str, step: int) -> bool:
        """Whether there is a record of this split and step already."""
        return self._metrics is not None and self._metrics.has(split, step)

    def write(self, record: Record) -> None:
        """Writes to metrics.jsonl and TensorBoard."""
        for file in self._files:
            with self._patience(file.path):
                file.write(record)

    def sync(self) -> None:
        """Returns when all records so far are on the disk, or kept to be written later."""
        for file in self._files:
            with self._patience(file.path):
                file.sync()

    @contextlib.contextmanager
    def _patience(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._patient or error.errno == errno.ESTALE:  # it would not be found later
                raise
            if path not in self._unwritten:
                self._unwritten.add(path)
                self.terminal.say(
                    f"warning: {path} cannot be written ({error.strerror}); its records are kept, "
                    "and written as soon as that can be done"
                )
        else:
            if path in self._unwritten:
                self._unwritten.remove(path)
                self.terminal.say(f"{path} can be written again, and has all records")

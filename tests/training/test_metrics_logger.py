"""Records of training on the host."""

import contextlib
import json

import ml_collections
import numpy as np
import optax
import pytest

from resnet_flax.runtime import storage
from resnet_flax.training.metrics_logger import RATES, MetricsLogger
from resnet_flax.training.writers import MetricsFile, Writers, read_metrics


class NoInput:
    """An input that never waits."""

    most, waited, error = 100, 0.0, None

    def advance(self, state, step, n):
        """Never asked."""
        raise AssertionError


@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.5),
        optax.join_schedules(
            [optax.constant_schedule(0.01), optax.piecewise_constant_schedule(0.1, {1000: 0.1})],
            [400],
        ),
        optax.cosine_decay_schedule(0.1, 2 * RATES + 77),
    ],
)
def test_learning_rates_are_computed_many_at_a_time(schedule, tmp_path):
    """Computed one by one, each would wait on a GPU for the steps dispatched before it."""
    calls, start, steps = [], 5, 2 * RATES + 77

    def counted(step):
        calls.append(1)
        return schedule(step)

    config = ml_collections.ConfigDict({"log": {"every": 1}, "steps": steps, "batch_size": 1})
    with Writers(tmp_path, start, steps, tensorboard=False, bar=False, silent=False) as writers:
        meter = MetricsLogger(config, counted, writers, NoInput())
        for first in range(start, steps, NoInput.most):
            n = min(NoInput.most, steps - first)
            names = "loss", "error", "count", "grad_norm", "param_norm"
            meter.add(first, n, dict.fromkeys(names, np.ones(n)))
        meter.read()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(start + 1, steps + 1))
    expected = [float(schedule(record["step"] - 1)) for record in records]
    found = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(found, expected, 1e-6, atol=1e-8)  # float32's rounding of 0.1
    assert len(calls) == 3


def test_a_metric_of_several_numbers_is_written_with_tensorboard_too(tmp_path):
    record = {"split": "test", "step": 1, "loss": 0.5, "per_class": [0.1, 0.2], "nothing": None}
    with Writers(tmp_path, 0, 1, tensorboard=True, bar=False) as writers:
        writers.write(record)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]


def _record(step, split="train"):
    return {"split": split, "step": step, "loss": 0.5}


def test_of_a_damaged_metrics_file_only_damaged_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(_record(step)).encode() for step in range(1, 7)]
    zeros = b"\0" * 4096
    path.write_bytes(
        b"\n".join([lines[0], b"\xff\xfe\0\x85\r", lines[1], zeros + lines[2], b"[" * 10**5])
        + b'\n{"split": "train", "step": "4", "loss": 1.0}\n{"split": 1, "step": 4, "loss": 1.0}\n'
        + b"\n".join([lines[4], lines[5][:20]])
    )
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 5]
    MetricsFile(path, 3).close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:3])


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "its directory moved"])
@pytest.mark.parametrize("then", ["write", "sync"])
def test_that_a_metrics_file_is_gone_is_said_at_once(tmp_path, how, then):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(_record(1))
    file.sync()
    if how == "its directory moved":
        path.parent.rename(tmp_path / "moved")
    elif how == "moved":
        path.rename(tmp_path / "moved")
    else:
        path.unlink()
        if how == "replaced":
            path.touch()
    with pytest.raises(OSError, match="removed, moved or replaced during the run") as error:
        file.write(_record(2)) if then == "write" else file.sync()
    assert error.value.errno in storage.OF_THE_MACHINE
    file.close()


@pytest.mark.parametrize("patient", [True, False])
def test_records_wait_until_there_is_room_again(disk, capsys, patient):
    with Writers(disk, 0, 100, tensorboard=True, bar=False, patient=patient) as writers:
        writers.write(_record(1))
        with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as file:
            while True:
                file.write(b"x" * 4096)
        if not patient:
            with pytest.raises(OSError, match=r"No space left on device: .*(metrics|tensorboard)"):
                [writers.write(_record(step)) for step in range(2, 200)]
            return
        for step in range(2, 200):
            writers.write(_record(step))
        assert len(read_metrics(disk / "metrics.jsonl")) < 150
        shown = capsys.readouterr().out
        said = "metrics.jsonl cannot be written (No space left on device); its records are"
        assert shown.count(said) == 1
        (disk / "filler").unlink()
        writers.sync()
        shown = capsys.readouterr().out
        assert shown.count("can be written again, and has all records") == 2
        writers.sync()
        assert "again" not in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(disk / "metrics.jsonl")] == list(range(1, 200))
    assert _events(disk / "tensorboard") == list(range(1, 200))


def _events(directory):
    """The steps of the losses in event files, with every checksum verified."""
    import struct

    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (file,) = directory.iterdir()
    content, steps = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        body, checksum = content[12 : 12 + length], content[12 + length : 16 + length]
        assert struct.unpack("<I", checksum)[0] == masked_crc32c(body)
        event, content = Event.FromString(body), content[16 + length :]
        steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    return steps

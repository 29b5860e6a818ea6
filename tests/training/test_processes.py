"""Several real processes on the loopback interface, with Gloo collectives."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiments import TINY
from photographs import make_folder

from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed
from resnet_flax.runtime.lock import Lock
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.writers import read_metrics

ROOT = Path(__file__).parent.parent.parent
SHORT = (
    "--config.model.name=cifar_resnet8",
    "--config.batch_size=32",
    "--config.steps=12",
    "--config.optim.schedule=constant",
    "--config.optim.warmup_steps=4",
    "--config.checkpoint.every=6",
    "--config.eval.every=6",
    "--config.data.eval_batch_size=56",  # 360 test images: the last batch has 24
    "--config.log.every=2",
    "--config.log.tensorboard=false",
)


@pytest.fixture
def together(data_dir):
    """Starts `train.py` in several processes; waits for them and returns each one's output."""
    running: list[subprocess.Popen] = []

    def start(n, *flags, devices=1, each=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = dict(os.environ)
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        for i in range(n):
            place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={n}", f"--process_id={i}"]
            command = [sys.executable, "train.py", f"--config.data.data_dir={data_dir}", *SHORT]
            command += [*flags, *(place if n > 1 else []), *(each[i] if each else ())]
            running.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running[-n:]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def _ended(processes, status=0):
    """The output of each, once all have ended with `status`."""
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


def _curve(workdir):
    return {
        (r["split"], r["step"]): (r["loss"], r["error"], r.get("count", 0))
        for r in read_metrics(workdir / "metrics.jsonl")
    }


def _assert_same_curve(curve, reference):
    assert curve.keys() == reference.keys()
    for key, (loss, error, count) in reference.items():
        assert curve[key][0] == pytest.approx(loss, rel=1e-3), key
        assert curve[key][1] == pytest.approx(error, abs=0.04), key
        assert curve[key][2] == count, key


@pytest.mark.long
def test_two_processes_give_one_s_curve_and_only_the_first_speaks(together, tmp_path):
    (alone,) = _ended(together(1, f"--workdir={tmp_path / 'one'}", devices=2))
    first, second = _ended(together(2, f"--workdir={tmp_path / 'two'}"))
    reference = _curve(tmp_path / "one")
    _assert_same_curve(_curve(tmp_path / "two"), reference)
    assert reference["test", 12][2] == 360  # each once, although 56 does not divide 360
    assert first[0].splitlines()[-1] == alone[0].splitlines()[-1].replace("/one", "/two")
    assert not any("step" in line or "error" in line for line in second[0].splitlines())
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "result.json",
        "sessions.json",
    }
    assert len((tmp_path / "two/metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.long
def test_a_checkpoint_of_four_is_read_by_any_number(together, tmp_path):
    longer = "--config.steps=18"
    _ended(together(1, longer, f"--workdir={tmp_path / 'whole'}"))
    four = together(4, f"--workdir={tmp_path / 'four'}", "--config.mesh.fsdp=2")
    _ended(four)
    reference = _curve(tmp_path / "whole")
    _assert_same_curve(
        _curve(tmp_path / "four"), {k: v for k, v in reference.items() if k[1] <= 12}
    )
    for name, processes, devices in (("by_one", 1, 1), ("by_two", 2, 1), ("by_eight", 1, 8)):
        workdir = tmp_path / name
        shutil.copytree(tmp_path / "four", workdir)
        printed = _ended(together(processes, longer, f"--workdir={workdir}", devices=devices))
        assert "continues at step 12 of 18" in printed[0][0]
        _assert_same_curve(_curve(workdir), reference)


@pytest.mark.long
def test_a_signal_to_one_stops_all_at_the_same_step(together, tmp_path):
    processes = together(2, f"--workdir={tmp_path}", "--config.steps=4000")
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    printed = _ended(processes, 128 + signal.SIGTERM)
    saved = {
        text.split("at step ")[1].split(",")[0]
        for _, error in printed
        for text in error.splitlines()
        if "stopped by SIGTERM" in text
    }
    assert len(saved) == 1
    assert (tmp_path / "checkpoints" / saved.pop()).is_dir()


def test_processes_with_other_configs_are_named(together, tmp_path):
    each = ((), ("--config.optim.learning_rate=0.2",))
    printed = _ended(together(2, f"--workdir={tmp_path / 'x'}", each=each), status=2)
    for _, error in printed:
        assert "error: process 1 of 2 was started with another config than process 0" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("process_id", [0, 1])
def test_who_does_not_come_is_named_in_time(together, tmp_path, process_id):
    # Only one of two processes is started: process 0 waits, process 1 finds nobody.
    flags = ["--coordinator=127.0.0.1:9", "--num_processes=2", f"--process_id={process_id}"]
    if process_id == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            flags[0] = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    (process,) = together(1, f"--workdir={tmp_path}", *flags, "--coordinator_seconds=3")
    start = time.monotonic()
    ((_, error),) = _ended([process], status=2)
    assert time.monotonic() - start < 60
    who = "the 2 processes" if process_id == 0 else "the coordinator 127.0.0.1:9"
    assert f"error: {who} did not answer within 3 s; start all processes with" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, -1), "belong together; give all three"),
        (("", 2, 0), "belong together; give all three"),
        (("host", 2, 0), "--coordinator must be the first process's HOST:PORT, not 'host'"),
        (("host:99999", 2, 0), "--coordinator must be the first process's HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be less than --num_processes=2"),
    ],
)
def test_flags_that_do_not_fit_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, "SLURM"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),  # salloc, or one task
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "x"}, ""),
    ],
)
def test_launchers_are_told_by_the_environment(environment, name, monkeypatch):
    assert distributed.launcher(environment) == name
    called = []
    monkeypatch.setattr(distributed, "launcher", lambda: name)
    monkeypatch.setattr("jax.distributed.initialize", lambda **settings: called.append(settings))
    distributed.start()
    assert len(called) == bool(name)


def test_one_process_asks_nobody():
    assert distributed.is_primary()
    assert distributed.all_max(7) == 7
    distributed.barrier()
    distributed.assert_same_on_all({"a": 1})


@pytest.mark.long
def test_an_image_that_one_process_cannot_read_loses_nothing(together, tmp_path):
    folder = make_folder(tmp_path / "images", train=64)
    flags = (
        f"--config.data.source=folder:{folder}",
        "--config.data.eval_split=val",
        "--config.data.in_memory=false",
        "--config.data.resident=false",
        "--config.steps_per_dispatch=1",
        "--config.data.eval_batch_size=8",
        "--config.checkpoint.every=0",
        "--config.eval.every=0",
        "--config.steps=400",
        f"--config.model.overrides={TINY}",
    )
    _ended(together(2, *flags, f"--workdir={tmp_path / 'whole'}"))
    image = folder / "train" / "red" / "000.png"
    good = image.read_bytes()
    processes = together(2, *flags, f"--workdir={tmp_path / 'run'}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    image.write_bytes(good[:50])
    errors = [error for _, error in _ended(processes, status=2)]
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 8 <= step < 400
    for error in errors:
        assert f"(step {step} is saved in {tmp_path / 'run'}; the same command" in error
        assert "Traceback" not in error
    assert sum("000.png cannot be decoded" in error for error in errors) == 1
    assert (
        sum(
            f"another process could not read its part of the batch of step {step + 1}" in error
            for error in errors
        )
        == 1
    )
    image.write_bytes(good)
    _ended(together(2, *flags, f"--workdir={tmp_path / 'run'}"))
    digests = [
        read_meta(tmp_path / name / "checkpoints" / "400")["digests"] for name in ("whole", "run")
    ]
    assert digests[0] == digests[1]


@pytest.mark.long
def test_all_processes_hear_that_the_workdir_is_in_use(together, tmp_path):
    with Lock(tmp_path):
        printed = _ended(together(2, f"--workdir={tmp_path}"), status=2)
    assert f"in use by a run that process {os.getpid()} on" in printed[0][1]
    assert f"process 0 cannot use the workdir {tmp_path}; see its error" in printed[1][1]

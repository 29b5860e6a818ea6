"""Several real processes on the loopback interface, with Gloo collectives."""

import contextlib
import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
import together as several
from experiments import TINY
from photographs import COLOURS, make_folder
from together import ended as _ended

from resnet_flax.cli.stoppable import heard
from resnet_flax.data.sampler import Sampler
from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed, launchers
from resnet_flax.runtime.heartbeat import Heartbeat
from resnet_flax.runtime.storage.lock import Lock
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.session import Interrupted
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
        command = ["train.py", f"--config.data.data_dir={data_dir}", *SHORT, *flags]
        return several.start(running, n, *command, devices=devices, each=each)

    yield start
    several.kill(running)


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
def test_processes_go_back_together_after_training_diverged(together, tmp_path):
    flags = (
        "--config.optim.learning_rate=1e30",
        "--config.optim.on_divergence=lower_rate",
        "--config.optim.divergence_factor=1e-31",
    )
    _ended(together(1, *flags, f"--workdir={tmp_path / 'one'}", devices=2))
    first, second = _ended(together(2, *flags, f"--workdir={tmp_path / 'two'}"))
    assert "continues from step 0 with all learning rates multiplied by 1e-31" in first[0]
    assert "diverged" not in second[0]
    _assert_same_curve(_curve(tmp_path / "two"), _curve(tmp_path / "one"))


@pytest.mark.long
def test_processes_whose_training_diverges_end_together(together, tmp_path):
    flags = ("--config.optim.learning_rate=1e30", f"--workdir={tmp_path}")
    for _, error in _ended(together(2, *flags), status=2):
        assert error.startswith("error: training diverged at step 2 (")


@pytest.mark.long
def test_a_signal_to_one_stops_all_at_the_same_step(together, tmp_path):
    processes = together(2, f"--workdir={tmp_path}", "--config.steps=4000")
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    printed = _ended(processes, 128 + signal.SIGTERM)
    assert printed[1][1] == ""  # only the first one speaks
    assert printed[0][1].startswith("stopped by SIGTERM at step ")
    saved = printed[0][1].split("at step ")[1].split(",")[0]
    assert (tmp_path / "checkpoints" / saved).is_dir()


ENDLESS = (
    "--config.steps=100000",
    "--config.checkpoint.every=20",
    "--config.eval.every=0",
    f"--config.model.overrides={TINY}",
)


def _until_saved(processes, workdir):
    """Waits for the next checkpoint."""
    known, deadline = _saved_steps(workdir), time.monotonic() + 200
    while not _saved_steps(workdir) - known:
        assert all(process.poll() is None for process in processes), _ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _saved_steps(workdir):
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return {int(path.name) for path in found if path.name.isdecimal()}


def _survivor(process, lost, how, within):
    """Asserts that a process ends in time with a sentence on the lost one."""
    start = time.monotonic()
    out, error = process.communicate(timeout=100)
    seconds = time.monotonic() - start
    print(f"ended {seconds:.2f} s after the loss")
    assert process.returncode == 1, (out, error)
    assert error == (
        f"error: process {lost} of 2 on {socket.gethostname()} is lost: {how}; the same command, "
        "with any number of processes, continues from the newest checkpoint, if there is one\n"
    )
    assert seconds < within


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_at_once_and_others_continue(together, tmp_path, killed):
    processes = together(2, *ENDLESS, f"--workdir={tmp_path}")
    _until_saved(processes, tmp_path)
    processes[killed].kill()
    how = "its connection was closed, as it is when a process is killed"
    _survivor(processes[1 - killed], killed, how, within=25)
    newest = max(_saved_steps(tmp_path))
    flags = (*ENDLESS, f"--config.steps={newest + 4}")
    ((out, error),) = _ended(together(1, *flags, f"--workdir={tmp_path}"))
    assert f"continues at step {newest} of {newest + 4}" in out, (out, error)


@pytest.mark.long
def test_a_frozen_process_is_named_and_ends_when_it_wakes(together, tmp_path):
    processes = together(2, *ENDLESS, "--heartbeat_seconds=3", f"--workdir={tmp_path}")
    _until_saved(processes, tmp_path)
    processes[1].send_signal(signal.SIGSTOP)
    how = "nothing was heard from it for 3 s, so it is frozen or its host failed"
    _survivor(processes[0], 1, how, within=25)
    processes[1].send_signal(signal.SIGCONT)
    out, error = processes[1].communicate(timeout=100)
    assert processes[1].returncode == 1, (out, error)
    assert error.startswith("error: this process (1 of 2) was suspended: the others heard nothing")
    assert len(error.splitlines()) == 1


@pytest.mark.long
def test_a_job_that_is_suspended_as_a_whole_goes_on(together, tmp_path):
    processes = together(2, *ENDLESS, "--heartbeat_seconds=3", f"--workdir={tmp_path}")
    _until_saved(processes, tmp_path)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    for process in processes:
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
    _until_saved(processes, tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    _ended(processes, 128 + signal.SIGTERM)


def _its_own_cause():
    error = UserError("no")
    error.__cause__ = error
    return error


class _Noted(Heartbeat):
    """A heartbeat that only notes what would be said to the others."""

    def __init__(self):
        self.limit, self.said = 30.0, []

    def leave(self, word, status, pause=0.0):
        self.said.append((word, status, pause))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, ("goodbye", 0, 0.0)),
        (Interrupted("stopped", signal.SIGTERM), ("goodbye", 143, 0.0)),
        (UserError("no"), ("failed", 2, 2.0)),
        (TypeError("a bug"), ("failed", 1, 2.0)),
        # Gloo may wait for a frozen process for a shorter time than the heartbeat.
        (jax.errors.JaxRuntimeError("Gloo: connection closed"), ("failed", 1, 32.0)),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"), ("failed", 1, 2.0)),
        (KeyboardInterrupt(), ("abandon", 1, 0.0)),
        (_its_own_cause(), ("failed", 2, 2.0)),
    ],
)
def test_a_process_says_to_the_others_how_it_ends(error, said):
    noted = _Noted()
    with contextlib.suppress(type(error) if error else ()), heard(noted):
        if error:
            raise error
    assert noted.said == [said]


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
        flags[0] = f"--coordinator=127.0.0.1:{several.free_port()}"
    (process,) = together(1, f"--workdir={tmp_path}", *flags, "--coordinator_seconds=3")
    start = time.monotonic()
    ((_, error),) = _ended([process], status=2)
    assert time.monotonic() - start < 60
    who = "the 2 processes" if process_id == 0 else "the coordinator 127.0.0.1:9"
    assert f"error: {who} did not answer within 3 s; start all processes with" in error
    assert "Traceback" not in error


def test_who_does_not_come_is_not_waited_for_where_that_cannot_be_printed(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ended = threading.Event()
    monkeypatch.setattr("jax.distributed.initialize", lambda **settings: ended.wait(10))
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(sys, "stderr", Full())
    distributed.start("127.0.0.1:9", 2, 0, seconds=0)
    assert ended.is_set()


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


@pytest.fixture
def connected(monkeypatch):
    """The settings of calls to connect, as in an environment that a launcher has made."""
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **settings: calls.append(settings))

    def start(environment, *arguments):
        for name in [*os.environ]:
            if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_", "CUDA_VISIBLE")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        distributed.start(*arguments)
        return calls

    return start


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_NODEID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_4 = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "TORCHELASTIC_RUN_ID": "x",
}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        # One process on a host takes all its GPUs; several share them.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, []),
        (
            {
                **SLURM,
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
                "SLURM_LOCALID": "1",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3",
            },
            [2, 3],
        ),
        # As with --gpus-per-task: each sees its own only.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0"}, []),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,2", "CUDA_VISIBLE_DEVICES": ""}, []),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # salloc, or one task
        ({**OPEN_MPI_4, "CUDA_VISIBLE_DEVICES": "0,1"}, [0]),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "JAX's"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, []),
        ({"KUBERNETES_SERVICE_HOST": "x"}, None),
    ],
)
def test_launchers_are_known_by_the_environment(connected, environment, devices):
    calls = connected(environment)
    assert len(calls) == (devices is not None)
    for settings in calls:
        assert settings.get("local_device_ids", "JAX's") == devices
        assert "coordinator_address" not in settings


def test_gpus_that_are_not_used_are_told():
    place = launchers.Place("SLURM", 4, 0, local_size=2, gpus=8)
    assert launchers.warnings(place, 4, {}) == []
    assert launchers.warnings(place, 0, {}) == []  # on CPUs
    (warning,) = launchers.warnings(place, 1, {})
    assert "gave this host 8 GPUs, but its processes (2) use 2" in warning


@pytest.mark.parametrize("name", ["Open MPI", "mpiexec", "torchrun"])
def test_where_a_launcher_does_not_tell_the_first_host_it_is_given(connected, name):
    environment = {"Open MPI": OPEN_MPI, "mpiexec": MPICH, "torchrun": TORCHRUN}[name]
    with pytest.raises(UserError, match=f"{name} started this .* where number 0 is; add --coord"):
        connected(environment)
    (settings,) = connected(environment, "a:1")
    size, rank = (4, 2) if name == "Open MPI" else (2, 1)
    assert settings["coordinator_address"] == "a:1"
    assert (settings["num_processes"], settings["process_id"]) == (size, rank)
    with pytest.raises(UserError, match=f"{name} started sweep as {size} processes, but it runs"):
        distributed.refuse_several("sweep")


def test_all_devices_are_used_by_a_process_that_is_alone_on_its_host():
    """JAX by itself lets each process use one; an empty list stands for all."""
    environment = {**os.environ, **SLURM, "SLURM_STEP_TASKS_PER_NODE": "1"}
    environment |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    program = (
        "import jax\n"
        "from jax._src import distributed as theirs\n"
        "theirs.State.initialize_preemption_sync_manager = lambda self: None\n"
        "class Stop(Exception): pass\n"
        "def stop(*_, **__): raise Stop\n"
        "theirs._jax.get_distributed_runtime_service = stop\n"
        "from resnet_flax.runtime import distributed\n"
        "try:\n    distributed.start()\n"
        'except Stop:\n    print(jax.config.values["jax_cuda_visible_devices"])\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "all\n", done.stderr


@pytest.mark.long
def test_a_workdir_that_is_not_shared_is_refused(together, tmp_path):
    processes = together(2, each=[[f"--workdir={tmp_path / name}"] for name in "ab"])
    for _, error in _ended(processes, 2):
        assert "process 1 of 2 does not see what process 0 writes into" in error
        assert "Traceback" not in error


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


ONE_FAILS = (
    "--config.data.eval_split=val",
    "--config.data.in_memory=false",
    "--config.data.resident=false",
    "--config.steps_per_dispatch=1",
    "--config.data.eval_batch_size=8",
    "--config.batch_size=8",
    "--config.checkpoint.every=0",
    "--config.steps=4",
    "--config.optim.warmup_steps=2",
    f"--config.model.overrides={TINY}",
)


def _one_fails_and_all_save(together, tmp_path, image, step, what, *flags):
    """An image is damaged that only the second of two processes reads, after the state of `step`.

    Returns the digests of the run's last state, after the image is mended.
    """
    good = image.read_bytes()
    image.write_bytes(good[:50].ljust(len(good)))  # the same size, so that the run may continue
    printed = _ended(together(2, *flags, f"--workdir={tmp_path / 'run'}"), status=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]
    recomputes = any("recompute_bn" in flag for flag in flags)
    assert read_meta(tmp_path / "run" / "checkpoints" / str(step))["averaged"] is not recomputes
    for _, error in printed:
        assert f"(step {step} is saved in {tmp_path / 'run'}; the same command" in error
        assert "Traceback" not in error
    assert f"error: another process could not read its part of {what}; see" in printed[0][1]
    assert f"error: {image} cannot be decoded" in printed[1][1]
    image.write_bytes(good)
    printed = _ended(together(2, *flags, f"--workdir={tmp_path / 'run'}"))
    assert f"at step {step} of 4" in printed[0][0]
    return read_meta(tmp_path / "run" / "checkpoints" / "4")["digests"]


def test_data_that_one_process_cannot_use_end_all_before_the_first_step(together, tmp_path):
    folders = [make_folder(tmp_path / name, train=4, val=4) for name in ("a", "b")]
    image = folders[1] / "val" / "red" / "003.png"
    image.write_bytes(image.read_bytes()[:50])
    each = [[f"--config.data.source=folder:{folder}"] for folder in folders]
    processes = together(2, *ONE_FAILS, f"--workdir={tmp_path / 'run'}", each=each)
    (_, first), (_, second) = _ended(processes, status=2)
    assert first == "error: another process cannot use its data; see its error\n"
    assert second.startswith(f"error: in the split 'val', {image} cannot be decoded")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_an_evaluation_image_that_one_process_cannot_read_loses_nothing(together, tmp_path):
    # Of more than a thousand images, only a sample is read before the first step.
    folder = make_folder(tmp_path / "images", train=16, val=400)
    flags = (*ONE_FAILS, f"--config.data.source=folder:{folder}", "--config.eval.every=2")
    _ended(together(2, *flags, f"--workdir={tmp_path / 'whole'}"))
    image = folder / "val" / "blue" / "006.png"  # in the first batch
    digests = _one_fails_and_all_save(
        together, tmp_path, image, 2, "the evaluation at step 2", *flags
    )
    assert digests == read_meta(tmp_path / "whole" / "checkpoints" / "4")["digests"]
    curves = [_curve(tmp_path / name) for name in ("whole", "run")]
    assert curves[0] == curves[1]
    assert curves[0]["val", 2][2] == 1200


@pytest.mark.long
@pytest.mark.parametrize(
    ("batch", "step", "what"),
    [(4, 4, "the batches of eval.recompute_bn"), (3, 3, "the batch of step 4")],
)
def test_statistics_that_one_process_cannot_recompute_lose_nothing(
    together, tmp_path, batch, step, what
):
    folder = make_folder(tmp_path / "images", train=16, val=8)
    flags = (
        *ONE_FAILS,
        f"--config.data.source=folder:{folder}",
        "--config.eval.every=0",
        "--config.eval.recompute_bn=2",
    )
    _ended(together(2, *flags, f"--workdir={tmp_path / 'whole'}"))
    # In the second half of a batch, the first one after training or the last one of it, so that
    # the second process reads it, and for nothing else.
    number = Sampler(48, seed=0).examples(batch * 8 + 4, 4)[0]
    image = folder / "train" / sorted(COLOURS)[number // 16] / f"{number % 16:03}.png"
    digests = _one_fails_and_all_save(together, tmp_path, image, step, what, *flags)
    assert digests == read_meta(tmp_path / "whole" / "checkpoints" / "4")["digests"]


@pytest.mark.long
def test_all_processes_hear_that_the_workdir_is_in_use(together, tmp_path):
    with Lock(tmp_path):
        printed = _ended(together(2, f"--workdir={tmp_path}"), status=2)
    assert f"in use by a run that process {os.getpid()} on" in printed[0][1]
    assert f"process 0 cannot use the workdir {tmp_path}; see its error" in printed[1][1]


PRINTS_A_LOT = """
import sys, time
from pathlib import Path
done = Path(sys.argv[-2])
if sys.argv[-1] == "1":
    print("x" * 2**20, flush=True)
    done.touch()
deadline = time.monotonic() + 60
while not done.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(not done.exists())
"""


def test_the_output_of_all_is_read_at_once(tmp_path):
    running = []
    each = [(str(tmp_path / "done"), str(i)) for i in range(2)]
    try:
        started = several.start(running, 2, "-c", PRINTS_A_LOT, each=each)
        printed = _ended(started, seconds=120)
    finally:
        several.kill(running)
    assert [len(out) for out, _ in printed] == [0, 2**20 + 1]

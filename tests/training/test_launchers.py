"""Trainings in several processes that real launchers start, where they are installed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from together import free_port

ROOT = Path(__file__).parent.parent.parent
SHORT = (
    "--config.model.name=cifar_resnet8",
    "--config.batch_size=32",
    "--config.steps=4",
    "--config.optim.schedule=constant",
    "--config.optim.warmup_steps=2",
    "--config.data.eval_batch_size=56",
    "--config.log.every=2",
    "--config.log.tensorboard=false",
)
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
MPIRUN = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"]
PATIENT = ["--mca", "odls_base_sigkill_timeout", "60"]


@pytest.fixture
def launched(data_dir, tmp_path):
    """Runs train.py by a launcher; returns the exit status and what it printed."""

    def run(launcher, *flags, program="train.py"):
        if shutil.which(launcher[0]) is None:
            pytest.skip(f"{launcher[0]} is not installed")
        where = [f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
        command = [*launcher, sys.executable, *program.split(), *where, *SHORT, *flags]
        done = subprocess.run(
            command, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    return run


def _result(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("patient", [True, False])
def test_open_mpi(launched, tmp_path, patient):
    status, out, err = launched([*MPIRUN, *(PATIENT if patient else ()), "-n", "2"])
    assert status == 0, err
    assert "2 x cpu in 2 processes" in out
    assert _result(tmp_path / "run")["count"] == 360
    assert out.count("checkpoints: ") == 1
    assert ("note: mpirun kills its processes one second after a SIGTERM" in err) is not patient


@pytest.mark.long
def test_mpich_needs_the_address_of_the_first_process(launched, tmp_path):
    launcher = ["mpiexec.mpich", "-n", "2"]
    status, _, err = launched(launcher)
    assert status != 0
    assert "mpiexec started this process as number 0 of 2, but does not tell where number 0" in err
    assert "Traceback" not in err
    status, out, err = launched(launcher, "--coordinator=localhost:49876")
    assert status == 0, err
    assert "2 x cpu in 2 processes" in out
    assert _result(tmp_path / "run")["count"] == 360


@pytest.mark.long
def test_a_sweep_is_not_run_twice(launched, tmp_path):
    status, _, err = launched([*MPIRUN, "-n", "2"], program="-m resnet_flax sweep")
    assert status != 0
    assert "Open MPI started sweep as 2 processes, but it runs in one; start it once" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM cluster of two nodes on this machine."""
    daemons = ("slurmctld", "slurmd", "sbatch")
    if os.getuid() != 0 or not all(shutil.which(name) for name in daemons):
        pytest.skip("needs root and SLURM: apt-get install slurmctld slurmd slurm-client")
    here = tmp_path / "slurm"
    (here / "state").mkdir(parents=True)
    conf = here / "slurm.conf"
    host = socket.gethostname()
    conf.write_text(SLURM_CONF.format(here=here, host=host, ports=[free_port() for _ in range(3)]))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        started = subprocess.run(command, capture_output=True, text=True)
        if started.returncode:
            pytest.skip(f"SLURM does not start here: {started.stderr}")
    yield
    subprocess.run(["scancel", "--full", "--user=root"], capture_output=True)
    for file in here.glob("*.pid"):
        os.kill(int(file.read_text()), signal.SIGKILL)


def _job(number):
    """The properties of a job."""
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))


def _wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


@pytest.mark.long
def test_the_script_for_slurm_queues_its_job_again_which_continues(slurm, data_dir, tmp_path):
    page = (ROOT / "docs" / "scaling.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)[1]
    script = re.sub(r"#SBATCH --(gpus|cpus).*\n", "", script)
    workdir, log = tmp_path / "run", tmp_path / "log"
    port = free_port()
    flags = " ".join([*SHORT, "--config.steps=400", "--config.log.every=20"])
    command = (
        f"{sys.executable} train.py --workdir={workdir} --config.data.data_dir={data_dir} {flags} "
        f"--coordinator=127.0.0.1:{port}"  # these nodes' names lead nowhere
    )
    script = re.sub(r"python train.py.*", lambda _: command, script)
    (tmp_path / "script.sh").write_text(script)
    submit = ["sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", tmp_path / "script.sh"]
    environment = {**ONE_DEVICE, "SLURM_CONF": os.environ["SLURM_CONF"]}
    submitted = subprocess.run(submit, env=environment, capture_output=True, text=True, check=True)
    job = submitted.stdout.strip()

    def shown():
        return f"{_job(job)} {log.read_text() if log.exists() else ''}"

    metrics = workdir / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, shown)
    # As at the time limit: to the steps, not to the script.
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    _wait_for(lambda: _job(job).get("Restarts") == "1", shown)
    assert "2 x cpu in 2 processes" in log.read_text()
    assert "stopped by SIGTERM at step" in log.read_text()
    time.sleep(10)  # it would start in two minutes, and cannot at once
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    _wait_for(lambda: _job(job)["JobState"] == "COMPLETED", shown, 240)
    assert re.search(r"continues at step \d+ of 400", log.read_text())
    assert _result(workdir)["count"] == 360

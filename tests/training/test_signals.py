"""Real signals and terminals: what ends a job or its output."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiments import ROOT, TINY
from marks import long
from photographs import make_folder

from resnet_flax.cli.stoppable import stoppable
from resnet_flax.data import readers
from resnet_flax.data.readers import Patience
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.session import Interrupted
from resnet_flax.training.writers import read_metrics

FLAGS = (
    "--config.model.name=cifar_resnet8",
    f"--config.model.overrides={TINY}",
    "--config.optim.warmup_steps=10",
    "--config.eval.every=0",
    "--config.checkpoint.every=0",
    "--config.log.every=5",
    "--config.log.tensorboard=false",
)
READERS = (
    "--config.data.resident=false",
    "--config.data.in_memory=false",
    "--config.data.workers=2",
    "--config.steps_per_dispatch=1",
)


@pytest.fixture(autouse=True)
def not_ignored():
    """Signals have their usual effect, even where these tests are started by nohup or with `&`."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start(data_dir, tmp_path):
    """Starts train.py in a new session; in `shell` the command is $RUN."""
    started = []

    def begin(*flags, shell="", steps=20_000, **keywords):
        flags = (*FLAGS, f"--config.steps={steps}", f"--workdir={tmp_path / 'run'}", *flags)
        command = [sys.executable, "train.py", f"--config.data.data_dir={data_dir}", *flags]
        environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        if shell:
            run = " ".join(f"'{part}'" for part in command)
            command = ["bash", "-c", shell.replace("$RUN", run)]
        keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, text=True, **keywords
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for pid in [process.pid, *_below(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def _below(pid):
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_below(child)]
    return found


def _readers(pid):
    def is_reader(child):
        try:
            return "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            return False

    return [child for child in _below(pid) if is_reader(child)]


def _records(workdir):
    return [r["step"] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]


def _wait(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _saved(workdir):
    steps = Checkpoints(workdir / "checkpoints", keep=1).steps()
    assert len(steps) == 1
    records = _records(workdir)
    assert not records or steps[0] >= records[-1]
    return steps[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, long(signal.SIGINT)])
def test_a_signal_to_a_pipeline_saves_though_tee_is_gone_first(start, tmp_path, number):
    process = start(shell=f"$RUN 2>&1 | tee {tmp_path}/log; exit ${{PIPESTATUS[0]}}")
    _wait(lambda: _records(tmp_path / "run"), process)
    tee = next(p for p in _below(process.pid) if Path(f"/proc/{p}/comm").read_text() == "tee\n")
    os.kill(tee, signal.SIGKILL)
    before = _records(tmp_path / "run")[-1]
    _wait(lambda: _records(tmp_path / "run")[-1] > before + 20, process)
    (trainer,) = (p for p in _below(process.pid) if "train.py" in _command(p))
    os.kill(trainer, number)
    assert process.wait(120) == 128 + number
    _saved(tmp_path / "run")
    assert "cannot be written (Broken pipe)" in (tmp_path / "run" / "terminal.log").read_text()


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize("what", ["full", long("closed")])
def test_a_run_whose_output_cannot_be_written_is_finished(start, tmp_path, what):
    if what == "full":
        with open("/dev/full", "w") as full:
            process = start(steps=60, stdout=full, stderr=full)
    else:
        process = start(steps=60)
        process.stdout.close()
        process.stderr.close()
    assert process.wait(120) == 0
    assert _saved(tmp_path / "run") == 60
    assert (tmp_path / "run" / "result.json").exists()
    assert (tmp_path / "run" / "terminal.log").exists()


@pytest.mark.parametrize("how", ["hung up", long("nohup")])
def test_a_terminal_that_is_closed(start, tmp_path, how):
    ours, theirs = pty.openpty()
    keywords = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    # A session leader with this controlling terminal, like a shell.
    control = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    control += "os.execvp(sys.argv[1], sys.argv[1:])"
    run = f'bash -c "exec nohup $RUN > {tmp_path}/out 2>&1"' if how == "nohup" else "$RUN"
    shell = f"exec {sys.executable} -c '{control}' {run}"
    process = start("--config.log.every=1", shell=shell, steps=400, **keywords)
    os.close(theirs)

    def drawn():
        os.set_blocking(ours, False)
        with contextlib.suppress(OSError):  # no output, or no writer
            os.read(ours, 100_000)
        return _records(tmp_path / "run")

    _wait(drawn, process)
    os.close(ours)
    if how == "nohup":
        assert process.wait(120) == 0
        assert _saved(tmp_path / "run") == 400
    else:
        assert process.wait(120) == 128 + signal.SIGHUP
        assert _saved(tmp_path / "run") < 400


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_that_ask_to_end_are_heard(number):
    with SignalHandler() as stop:
        for _ in range(2):  # a terminal sends SIGHUP twice; SIGTERM follows SLURM's SIGUSR1
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_second_ctrl_c_acts_as_always():
    with SignalHandler() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# Interrupts the program when it imports a module.
INTERRUPTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("program", [["train.py"], ["-m", "resnet_flax", "models"]])
@pytest.mark.parametrize("module", ["resnet_flax.cli", "json"])
def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path, program, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING.format(module))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        ["bash", "-c", 'trap - INT; exec "$@"', "bash", sys.executable, *program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# An exception in a destructor is printed and ignored by Python, as it is in JAX's callback of the
# garbage collector.
IN_A_DESTRUCTOR = """
import os
import signal
import sys
from types import SimpleNamespace
from resnet_flax import cli
from resnet_flax.cli.stoppable import stoppable

class Late:
    def __del__(self):
        for _ in range({}):
            signal.raise_signal(signal.SIGINT)

def run(stop=None):
    kill = SimpleNamespace(kill_processes=lambda: os.write(1, b"killed readers"))
    sys.modules["resnet_flax.data.readers"] = kill
    Late()
    print("went on")
    return 0

cli.main = lambda *_: {}
cli.main_and_exit()
"""


@pytest.mark.parametrize(
    ("times", "verb", "status", "said"),
    [(1, "run()", 130, ""), (2, "stoppable(run)", 1, "ended by a second Ctrl-C; the same command")],
)
def test_ctrl_c_in_a_destructor_is_not_ignored(times, verb, status, said):
    code = IN_A_DESTRUCTOR.format(times, verb)
    done = subprocess.run(
        ["bash", "-c", 'trap - INT; exec "$@"', "bash", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (status, "killed readers")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("saved", [True, False])
def test_the_status_of_a_second_ctrl_c_says_whether_the_state_is_saved(capsys, saved):
    def run(stop):
        try:
            raise Interrupted("stopped at step 5", signal.SIGINT) if saved else OSError
        finally:
            raise KeyboardInterrupt

    status = stoppable(run)
    error = capsys.readouterr().err
    assert status == (130 if saved else 1)
    said = "stopped at step 5" if saved else "ended by a second Ctrl-C before the state was saved"
    assert error.startswith(said)


# As of a save that has just begun, and lives as long as the program.
NEVER_AWAITED = """
from resnet_flax import cli
from resnet_flax.cli.stoppable import stoppable
async def save():
    pass
begun = [save()]
def run(stop):
    raise KeyboardInterrupt
cli.main = lambda *_: stoppable(run)
cli.main_and_exit()
"""


def test_a_second_ctrl_c_is_one_sentence_though_a_save_has_begun():
    done = subprocess.run(
        [sys.executable, "-c", NEVER_AWAITED], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ended by a second Ctrl-C before the state was saved; ")
    assert done.stderr.count("\n") == 1


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "readers start"),
        long(signal.SIGHUP, "readers start"),
        long(signal.SIGTERM, "training"),
        long(signal.SIGINT, "training"),
        long(signal.SIGUSR1, "evaluation"),
    ],
)
def test_a_signal_to_the_group_with_readers(start, tmp_path, number, moment):
    every = "--config.eval.every=40" if moment == "evaluation" else "--config.eval.every=0"
    process = start(*READERS, every)
    if moment == "readers start":
        _wait(lambda: _readers(process.pid), process)
    elif moment == "training":
        _wait(lambda: _records(tmp_path / "run"), process)
    else:
        _wait(lambda: 40 in _records(tmp_path / "run"), process)
        _wait(lambda: len(_readers(process.pid)) > 2, process)
    children = _readers(process.pid)
    os.killpg(process.pid, number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (out, error)
    when = "before the first step" if moment == "readers start" else "at step"
    assert error.startswith(f"stopped by {signal.Signals(number).name} {when}")
    assert len(error.splitlines()) == 1
    if moment != "readers start":
        _saved(tmp_path / "run")
    _wait_for_end(children)


def _is_running(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _wait_for_end(pids, seconds=30):
    """Waits for processes that are no children of this one: who reaps them may take its time."""
    deadline = time.monotonic() + seconds
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)


def _segments():
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.mark.long
def test_readers_end_with_a_run_that_is_killed(start, tmp_path):
    before = _segments()
    process = start(*READERS)
    _wait(lambda: _records(tmp_path / "run"), process)
    children = _below(process.pid)
    assert len(children) == 3  # two readers, and Python's resource tracker
    process.kill()
    process.wait()
    _wait_for_end(children)
    deadline = time.monotonic() + 30
    while _segments() - before:
        assert time.monotonic() < deadline, _segments() - before
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, long(signal.SIGSTOP)])
def test_a_reader_that_is_killed_or_frozen_ends_the_run_in_a_sentence(start, tmp_path, number):
    frozen = number == signal.SIGSTOP
    process = start(*READERS, f"--config.data.timeout={20 if frozen else 0}")
    _wait(lambda: _records(tmp_path / "run"), process)
    os.kill(_readers(process.pid)[0], number)
    out, error = process.communicate(timeout=90)
    assert process.returncode == 2, (out, error)
    step = _saved(tmp_path / "run")
    reason = {
        signal.SIGKILL: "a reader process was killed by SIGKILL, as the kernel does when memory",
        signal.SIGSTOP: "nothing was read within data.timeout=20 seconds; a reader is frozen",
    }[number]
    assert error.startswith(f"error: {reason}")
    assert f"(step {step} is saved in {tmp_path / 'run'}; the same command continues" in error
    assert len(error.splitlines()) == 1


FROZEN = """
import sys
from resnet_flax import cli
from resnet_flax.data import readers
def run(argv, programs):
    with readers.reading(range(100), 2, readers.Patience(1)) as elements:
        next(elements)
if __name__ == "__main__":
    cli._run, readers.GRACE = run, 0.1
    cli.main_and_exit()
"""


def test_readers_frozen_before_they_read_anything_end_with_the_program():
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    children = []
    try:
        _wait(lambda: len(_readers(process.pid)) == 2, process)
        children = _below(process.pid)  # and Python's resource tracker
        for child in _readers(process.pid):
            os.kill(child, signal.SIGSTOP)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        assert error.startswith("error: nothing was read within data.timeout=1 seconds")
        _wait_for_end(children)
    finally:
        for child in [process.pid, *children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


class Hanging:
    """Examples, one of which hangs when it is read."""

    def __init__(self, at, event):
        self._at, self._event = at, event

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == self._at:
            self._event.wait()
        return index


def test_waiting_has_a_limit_and_hears_that_it_is_to_end(monkeypatch):
    import threading

    from resnet_flax.errors import UserError

    monkeypatch.setattr(readers, "GRACE", 0.1)
    event, asked = threading.Event(), []
    with readers.reading(Hanging(3, event), 0, Patience(0.5)) as elements:
        assert [next(elements) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match=r"nothing was read within data.timeout=0.5 seconds"):
            next(elements)
    assert readers.stuck()
    with readers.reading(Hanging(0, event), 0, Patience(0, lambda: bool(asked))) as elements:
        asked.append(1)
        with pytest.raises(readers.WaitInterrupted):
            next(elements)
    event.set()
    deadline = time.monotonic() + 10
    while readers.stuck():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_its_end_a_reader_goes_on_saying_so():
    with readers.reading(range(3), 0) as elements:
        assert list(elements) == [0, 1, 2]
        assert list(elements) == []


def _on_a_folder(folder):
    return (
        f"--config.data.source=folder:{folder}",
        "--config.data.eval_split=val",
        "--config.data.resident=false",
        "--config.data.in_memory=false",
        "--config.steps_per_dispatch=1",
        "--config.batch_size=8",
    )


def _hang(directory):
    """Replaces a directory's images by pipes, which hang when they are opened."""
    for image in directory.iterdir():
        image.unlink()
        os.mkfifo(image)


@pytest.mark.long
@pytest.mark.parametrize("how", ["timeout", "Ctrl-C", "Ctrl-C twice"])
def test_a_run_whose_disk_hangs_ends(start, tmp_path, how):
    folder = make_folder(tmp_path / "images")
    limit = 10 if how == "timeout" else 0
    process = start(*_on_a_folder(folder), f"--config.data.timeout={limit}")
    _wait(lambda: _records(tmp_path / "run"), process)
    _hang(folder / "train" / "red")
    if how != "timeout":
        time.sleep(2)
        process.send_signal(signal.SIGINT)
    if how == "Ctrl-C twice":
        _wait(lambda: Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps(), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    if how == "timeout":
        assert process.returncode == 2, (out, error)
        assert error.startswith("error: nothing was read within data.timeout=10 seconds")
    else:
        assert process.returncode == 130
    _saved(tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", ["timeout", "SIGTERM"])
def test_a_disk_that_hangs_before_the_first_step(start, tmp_path, split, how):
    folder = make_folder(tmp_path / "images")
    _hang(folder / split / "blue")
    limit = 10 if how == "timeout" else 0
    process = start(*_on_a_folder(folder), f"--config.data.timeout={limit}")
    if how == "SIGTERM":
        _wait(lambda: "jax" in Path(f"/proc/{process.pid}/maps").read_text(), process)
        time.sleep(5)
        process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    if how == "timeout":
        assert process.returncode == 2, (out, error)
        assert error.startswith("error: nothing was read within data.timeout=10 seconds")
    else:
        assert process.returncode == 143, (out, error)
        assert error == (
            "stopped by SIGTERM before the first step; run the same command again to begin\n"
        )


@pytest.mark.long
def test_a_missing_evaluation_is_made_though_readers_start(start, tmp_path):
    """Readers of evaluation and of training start at the same time, and end separately."""
    every = ("--config.eval.every=40", "--config.checkpoint.every=40", *READERS)
    process = start(*every, steps=200)
    _wait(lambda: 40 in _records(tmp_path / "run"), process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    workdir = tmp_path / "run"
    step = Checkpoints(workdir / "checkpoints", keep=1).steps()[0]
    kept = workdir / "checkpoints" / str(40 * (step // 40))
    assert kept.is_dir()
    for other in (workdir / "checkpoints").iterdir():
        if other != kept:
            shutil.rmtree(other)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(x for x in lines if '"test"' not in x))
    process = start(*every, steps=200)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    evaluated = [r["step"] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "test"]
    assert evaluated == list(range(int(kept.name), 201, 40))


@pytest.mark.long
def test_records_on_a_disk_that_is_full(start, tmp_path):
    # Instead of a full disk, a limit on the size of files, which metrics.jsonl reaches first.
    process = start("--config.log.every=1", shell="ulimit -f 120; exec $RUN")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2, (out, error)
    step = _saved(tmp_path / "run")
    assert step > 50
    assert f"metrics.jsonl cannot be used: File too large (step {step} is saved in" in error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(line.endswith("}") for line in lines)


@pytest.mark.long
def test_output_that_nobody_reads_keeps_nothing_from_being_saved(start, tmp_path):
    process = start("--config.log.every=1")
    # A pipe buffers 64 KiB, about 900 lines.
    _wait(lambda: len(_records(tmp_path / "run")) > 2500, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    _saved(tmp_path / "run")
    assert "nobody reads" in (tmp_path / "run" / "terminal.log").read_text()


@pytest.mark.long
def test_no_output_at_all(start, tmp_path):
    process = start(steps=20, shell="exec $RUN >&- 2>&-")
    assert process.wait(120) == 0
    assert _saved(tmp_path / "run") == 20


SUSPENDED = """
import time
from resnet_flax.data.readers import Patience, reading
class Slow:
    def __len__(self): return 4
    def __getitem__(self, index): time.sleep(1); return index
if __name__ == "__main__":
    with reading(Slow(), 0, Patience(3)) as elements:
        print("begun", flush=True)
        print(list(elements))
"""


@pytest.mark.long
def test_time_in_which_the_job_is_suspended_does_not_count():
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=120)[0] == "[0, 1, 2, 3]\n"

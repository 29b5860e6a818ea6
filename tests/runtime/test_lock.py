"""One run in a workdir: locks of live, dead and remote processes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from resnet_flax.errors import UserError
from resnet_flax.runtime.storage import lock
from resnet_flax.runtime.storage.lock import NAME, Lock
from resnet_flax.training.outputs import claimed

HOLD = (
    "import sys, time; from pathlib import Path\n"
    "from resnet_flax.runtime.storage.lock import Lock\n"
    "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def _record(**changes):
    return json.dumps({**lock._this_process(), **changes})


def test_a_second_one_is_refused_and_names_the_first(tmp_path, holder):
    with pytest.raises(UserError, match=f"in use by a run that process {holder.pid} on .* began"):
        Lock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            Lock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_gets_it(tmp_path):
    inside, most, refused, done = [], [], [], []

    def take():
        try:
            with claimed(tmp_path, "checkpoints"):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.002)
                inside.pop()
                done.append(1)
        except UserError as error:
            refused.append(str(error))

    for _ in range(30):
        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(most) == {1}
    assert len(done) >= 30
    assert len(done) + len(refused) == 240
    assert all(f"a run that process {os.getpid()} on" in message for message in refused)


@pytest.mark.parametrize("text", ["", "{", "[1]", _record(boot="another"), _record(pid=2**22 + 1)])
def test_what_a_dead_run_left_is_taken_over(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with Lock(tmp_path):
        pass


def test_another_host_s_lock_counts_while_its_time_is_renewed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    path = tmp_path / NAME
    path.write_text(_record(host="elsewhere", pid=7))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            Lock(tmp_path).__enter__()
    finally:
        ended.set()
        thread.join()
    with Lock(tmp_path):
        first = path.stat().st_mtime_ns
        threading.Event().wait(0.3)
        assert path.stat().st_mtime_ns > first  # as another host would see it
    assert "last used by process 7 on elsewhere; waiting up to" in capsys.readouterr().out


@pytest.mark.parametrize("alive", [True, False])
def test_without_the_kernel_s_locks_the_process_is_looked_up(tmp_path, monkeypatch, alive):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    began = {} if alive else {"began": "1"}  # another process with the same PID
    (tmp_path / NAME).write_text(_record(**began))
    if alive:
        with pytest.raises(UserError, match="in use"):
            Lock(tmp_path).__enter__()
    else:
        with Lock(tmp_path):
            pass

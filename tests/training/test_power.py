"""A checkpoint is on the disk before an older one is deleted, and survives a power failure."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from experiments import TINY

from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.checkpoint_files import SUMS, read_meta
from resnet_flax.training.writers import read_metrics

ORBAX_S_NOTES = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.fixture
def calls(monkeypatch):
    """Syncs, renames and removals of this process, in order, as (what, path)."""
    seen = []

    def record(module, name, what, path_of):
        call = getattr(module, name)

        def recorded(*arguments, **keywords):
            path = path_of(*arguments)
            result = call(*arguments, **keywords)
            seen.append((what, path))
            return result

        monkeypatch.setattr(module, name, recorded)

    record(os, "fsync", "sync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    for name in ("rename", "replace"):
        record(os, name, "rename", lambda old, new, *_: str(new))
    record(shutil, "rmtree", "remove", lambda path, *_: str(path))
    return seen


def test_the_order_in_which_a_checkpoint_reaches_the_disk(tmp_path, calls):
    directory = tmp_path / "checkpoints"
    state = {"x": np.arange(1000.0), "y": {"z": np.ones(3, np.int32)}}
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        calls.clear()
        checkpoints.save(2, state, {})
        checkpoints.wait()
    assert [path.name for path in directory.iterdir()] == ["2"]
    unfinished = next(p for what, p in calls if what == "sync" and "2.orbax" in p)
    unfinished = unfinished[: unfinished.index("2.orbax")] + "2.orbax-checkpoint-tmp"
    named = calls.index(("rename", str(directory / "2")))
    synced = [path for what, path in calls[:named] if what == "sync"]
    # Before it is renamed: all its contents, each directory after its entries.
    for entry in (directory / "2").rglob("*"):
        if entry.name in ORBAX_S_NOTES:
            continue
        before = str(entry).replace(str(directory / "2"), unfinished)
        assert before in synced, entry
        if entry.is_dir():
            inside = [i for i, path in enumerate(synced) if path.startswith(f"{before}/")]
            assert max(inside) < synced.index(before)
    assert synced[-1] == unfinished
    assert f"{unfinished}/{SUMS}" in synced
    # Then the name, and only then the older one is deleted.
    name_synced = named + calls[named:].index(("sync", str(directory)))
    gone = next(i for i, (what, path) in enumerate(calls) if what == "remove" and "/1" in path)
    assert named < name_synced < gone


def test_records_are_on_the_disk_before_the_checkpoint_that_they_lead_to(config, tmp_path, calls):
    from resnet_flax.apply.experiment import train

    workdir = tmp_path / "run"
    config.log.tensorboard = True
    train(config, workdir)
    for step in (4, 8, 12):
        named = calls.index(("rename", str(workdir / "checkpoints" / str(step))))
        before = [path for what, path in calls[:named] if what == "sync"]
        assert before.count(str(workdir / "metrics.jsonl")) >= step // 4
        assert any("/tensorboard/events" in path for path in before)
    for name in ("config.json", "sessions.json", "result.json", "metrics.jsonl"):
        renamed = calls.index(("rename", str(workdir / name)))
        assert calls[renamed - 1] == ("sync", str(workdir / f".{name}.new"))
        assert calls[renamed + 1] == ("sync", str(workdir))


def _mounted(command):
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a disk image needs root and loop devices")


@pytest.fixture
def disk(tmp_path):
    """A directory on a disk image, and a function that mounts it as after a power failure."""
    image, live = tmp_path / "image", tmp_path / "live"
    subprocess.run(["truncate", "-s", "96M", image], check=True)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("making a disk image needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    live.mkdir()
    _mounted(["mount", "-o", "loop", image, live])
    mounts = [live]

    def fail():
        """The disk's contents at this moment, without what the kernel had not written yet."""
        number = len(mounts)
        copy, place = tmp_path / f"image{number}", tmp_path / f"failed{number}"
        while True:  # until the kernel has written nothing during the copy
            before = image.read_bytes()
            copy.write_bytes(before)
            if image.read_bytes() == before:
                break
        place.mkdir()
        subprocess.run(["mount", "-o", "loop", copy, place], check=True)
        mounts.append(place)
        return place

    yield live, fail
    for place in mounts:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.long
def test_a_power_failure_leaves_a_run_that_goes_on_with_the_same_bits(command, tmp_path, disk):
    live, fail = disk
    flags = (
        "--config.model.name=cifar_resnet8",
        f"--config.model.overrides={TINY}",
        "--config.steps=400",
        "--config.optim.warmup_steps=10",
        "--config.eval.every=100",
        "--config.log.every=5",
        "--config.checkpoint.every=25",
    )
    assert command(*flags, f"--workdir={tmp_path / 'whole'}").wait() == 0
    expected = read_meta(tmp_path / "whole" / "checkpoints" / "400")["digests"]
    process = command(*flags, f"--workdir={live / 'run'}")
    directory, places = live / "run" / "checkpoints", []
    rng = np.random.default_rng(0)
    while process.poll() is None and len(places) < 6:
        finished = Checkpoints(directory, keep=2).steps()
        if finished and (not places or finished[0] > places[-1][1]):
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGSTOP)
            seen = Checkpoints(directory, keep=2).steps()[0]
            places.append((fail(), seen))
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert len(places) >= 3
    for place, seen in places:
        # The newest visible one, or the one before, which is deleted only when that is safe.
        kept = Checkpoints(place / "run" / "checkpoints", keep=2).steps()
        assert kept, place
        assert kept[0] in (seen, seen - 25, seen + 25)
        records = read_metrics(place / "run" / "metrics.jsonl")
        steps = {r["step"] for r in records if r["split"] == "train"}
        assert steps >= set(range(5, kept[0] + 1, 5))
        again = command(*flags, f"--workdir={place / 'run'}")
        out, error = again.communicate()
        assert again.returncode == 0, error
        assert f"continues at step {kept[0]} of 400" in out
        assert "damaged" not in out
        assert read_meta(place / "run" / "checkpoints" / "400")["digests"] == expected

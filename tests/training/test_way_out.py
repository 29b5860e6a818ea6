"""Whatever ends a run, its state is saved."""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from photographs import folder_run, make_folder

from resnet_flax.apply.experiment import train
from resnet_flax.errors import UserError
from resnet_flax.training import loop
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.divergence import DivergedError
from resnet_flax.training.writers import read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of images, and the digests of an uninterrupted run on it."""
    folder = make_folder(tmp_path_factory.mktemp("photographs") / "images")
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(folder_run(folder), workdir)
    return folder, _digests(workdir)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(whole[0], tmp_path / "images")


@pytest.fixture
def config(folder):
    return folder_run(folder)


def _steps(workdir):
    return Checkpoints(workdir / "checkpoints", keep=1).steps()


def _digests(workdir):
    return read_meta(workdir / "checkpoints" / str(_steps(workdir)[0]))["digests"]


def _goes_on(config, workdir, whole):
    """Runs the same command again; the result has the same bits as an uninterrupted run."""
    result = train(config, workdir)
    assert _steps(workdir)[0] == config.steps
    assert _digests(workdir) == whole[1]
    records = [(r["split"], r["step"]) for r in read_metrics(workdir / "metrics.jsonl")]
    assert len(records) == len(set(records))
    return result


def _after(monkeypatch, calls, action):
    """Does something before a call of `Input.advance`, counted from 0."""
    from resnet_flax.training.input import Streaming

    advance, count = Streaming.advance, iter(range(1000))

    def advance_or(self, *arguments):
        if next(count) == calls:
            action()
        return advance(self, *arguments)

    monkeypatch.setattr(Streaming, "advance", advance_or)


def _wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("damage", ["truncated", "another size", "removed"])
def test_an_evaluation_image_damaged_during_the_run(
    config, folder, tmp_path, whole, monkeypatch, damage
):
    from PIL import Image

    image = folder / "val" / "green" / "003.png"
    good = image.read_bytes()

    def spoil():
        if damage == "truncated":
            image.write_bytes(good[:40])
        elif damage == "removed":
            image.unlink()
        else:
            Image.new("RGB", (9, 8)).save(image)

    _after(monkeypatch, 5, spoil)
    with pytest.raises(UserError, match=r"003.png|have different sizes") as error:
        train(config, tmp_path / "run")
    assert f"(step 12 is saved in {tmp_path / 'run'}; the same command continues" in str(
        error.value
    )
    assert _steps(tmp_path / "run") == [12]
    image.write_bytes(good)
    monkeypatch.undo()
    assert _goes_on(config, tmp_path / "run", whole).count == 24


def test_a_training_image_removed_during_the_run(config, folder, tmp_path, whole, monkeypatch):
    images = list((folder / "train").rglob("*.png"))
    aside = tmp_path / "aside"
    _after(monkeypatch, 4, lambda: shutil.move(folder / "train", aside))
    with pytest.raises(UserError, match=r"No such file or directory \(step \d+ is saved in"):
        train(config, tmp_path / "run")
    assert 4 <= _steps(tmp_path / "run")[0] < 12
    shutil.move(aside, folder / "train")
    assert all(image.exists() for image in images)
    monkeypatch.undo()
    _goes_on(config, tmp_path / "run", whole)


def test_a_failure_between_two_evaluations_repeats_the_one_that_is_missing(
    config, folder, tmp_path, monkeypatch, whole
):
    config.eval.every = 4
    evaluate = loop.evaluate

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "evaluate", fail)
    with pytest.raises(ZeroDivisionError) as error:
        train(config, tmp_path / "run")
    assert "step 4 is saved" in error.value.__notes__[0]
    monkeypatch.setattr(loop, "evaluate", evaluate)
    _goes_on(config, tmp_path / "run", whole)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "val"] == [4, 8, 12]


def test_too_little_memory_is_one_sentence(config, tmp_path, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 B")
    _after(monkeypatch, 3, lambda: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"not enough memory on the device .* \(step 3 is saved in"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_is_the_same_in_all_processes(
    config, tmp_path, monkeypatch, processes
):
    config.eval.every = 4
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: SimpleNamespace(loss=float("nan")))
    # For `rescue` only, which saves what fails in all processes, though not what fails in one.
    several = SimpleNamespace(process_count=lambda: processes, tree=jax.tree)
    monkeypatch.setattr("resnet_flax.training.session.jax", several)
    said = r"at step 4 gave a loss of nan.*\(step 4 is saved in"
    with pytest.raises(DivergedError, match=said):  # for a sweep, which goes on
        train(config, tmp_path / "run")
    assert _steps(tmp_path / "run") == [4]


def test_an_evaluation_is_not_repeated_that_was_made(config, tmp_path, monkeypatch):
    config.eval.every = config.checkpoint.every = 4
    calls, evaluate = [], loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    _after(monkeypatch, 6, lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")  # as if killed instead
    train(config, tmp_path / "run")
    assert len(calls) == 3


def test_records_that_cannot_be_written(config, tmp_path, whole, monkeypatch):
    from resnet_flax.training.writers import MetricsFile

    write = MetricsFile.write

    def full(self, record):
        if record["step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(UserError, match=r"a file in .* No space left on device \(step [67] is sav"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert _steps(tmp_path / "run")[0] in (6, 7)
    _goes_on(config, tmp_path / "run", whole)


def test_a_disk_that_is_full_is_said_once(config, tmp_path, monkeypatch):
    from resnet_flax.training import checkpoint

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_sums", full)
    with pytest.raises(UserError) as error:
        train(config, tmp_path / "run")
    assert str(error.value).count("cannot save the checkpoint of step 12") == 1
    assert "is saved in" not in str(error.value)
    # After another error, it is reported too.
    monkeypatch.setattr(loop, "recompute_statistics", full)
    config.eval.recompute_bn = 2
    with pytest.raises(UserError, match=r"No space left on device; besides, cannot save the check"):
        train(config, tmp_path / "other")


def test_a_save_that_fails_is_tried_once_more(config, tmp_path, monkeypatch, whole):
    from resnet_flax.training import checkpoint

    write, count = checkpoint.write_sums, iter(range(1000))

    def full_at_first(path):
        if next(count) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path)

    monkeypatch.setattr(checkpoint, "write_sums", full_at_first)
    config.checkpoint.every = 5
    with pytest.raises(UserError, match=r"the checkpoint of step 5 .* \(step \d+ is saved in"):
        train(config, tmp_path / "run")
    assert _steps(tmp_path / "run")[0] >= 5
    config.checkpoint.every = 0
    _goes_on(config, tmp_path / "run", whole)


def test_a_state_that_is_not_finite_is_not_saved_on_the_way_out_either(
    config, tmp_path, monkeypatch
):
    config.optim.learning_rate = 1e38
    config.optim.schedule = "constant"
    _after(monkeypatch, 5, lambda: (_ for _ in ()).throw(UserError("an image is damaged")))
    with pytest.raises(UserError):
        train(config, tmp_path / "run")
    for step in _steps(tmp_path / "run"):
        assert step < 3


def test_a_step_that_broke_off_has_no_state_to_save(config, tmp_path, monkeypatch):
    from resnet_flax.training.input import Streaming

    advance, count = Streaming.advance, iter(range(1000))

    def broken(self, state, step, n):
        if next(count) == 5:
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return advance(self, state, step, n)

    monkeypatch.setattr(Streaming, "advance", broken)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        train(config, tmp_path / "run")
    assert _steps(tmp_path / "run") == []


def test_statistics_that_cannot_be_averaged(config, folder, tmp_path, monkeypatch):
    config.eval.recompute_bn = 3
    averaged = tmp_path / "averaged"
    result = train(config, averaged)
    average = loop.recompute_statistics

    def fail(*_):
        raise UserError("an image is damaged")

    monkeypatch.setattr(loop, "recompute_statistics", fail)
    with pytest.raises(UserError, match=r"an image is damaged \(step 12 is saved in"):
        train(config, tmp_path / "run")
    assert not read_meta(tmp_path / "run" / "checkpoints" / "12")["averaged"]
    assert _digests(tmp_path / "run") != _digests(averaged)
    monkeypatch.setattr(loop, "recompute_statistics", average)
    assert train(config, tmp_path / "run") == result
    assert _digests(tmp_path / "run") == _digests(averaged)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["12"]


@pytest.mark.parametrize("kind", ["empty", "truncated", "another size", "grey size"])
def test_the_evaluation_split_is_looked_at_before_the_first_step(config, folder, tmp_path, kind):
    from PIL import Image

    image = folder / "val" / "red" / "007.png"
    if kind == "empty":
        shutil.rmtree(folder / "val")
        (folder / "val").mkdir()
        expected = "val has no subdirectories; there must be one for each class, with images"
    elif kind == "truncated":
        image.write_bytes(image.read_bytes()[:50])
        expected = "in the split 'val', .*007.png cannot be decoded"
    elif kind == "another size":
        Image.new("RGB", (9, 8)).save(image)
        expected = (
            r"in the split 'val', example 0 has shape \[8, 8, 3\] .* and example 23 \[8, 9, 3"
        )
    else:
        config.data.pixel_mean, config.data.mean = True, (0.0,)
        for path in (folder / "val").rglob("*.png"):
            Image.new("RGB", (9, 9)).save(path)
        expected = r"the images of the split 'val' have shape \[9, 9, 3\] .*those of 'train' \[8, 8"
    with pytest.raises(UserError, match=expected):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curves_that_cannot_be_drawn_lose_no_result(config, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("resnet_flax.training.outputs.draw_curves", fail)
    with pytest.raises(
        UserError, match=r"curves.png cannot be written: Input/output error; everything"
    ):
        train(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["count"] == 24
    assert _steps(tmp_path / "run") == [12]


def test_curves_are_the_old_or_the_new_ones(tmp_path, monkeypatch):
    from resnet_flax.training.curves import draw_curves

    metrics, curves = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text('{"split": "train", "step": 1, "loss": 1.0}\n')
    draw_curves(metrics, curves, "old")
    old = curves.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        draw_curves(metrics, curves, "new")
    assert curves.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    monkeypatch.undo()
    draw_curves(metrics, curves, "new")
    assert old != curves.read_bytes()


def test_all_of_a_small_split_is_looked_at_and_a_sample_of_a_large_one():
    from resnet_flax.data.check import SAMPLE, SMALL, check_examples
    from resnet_flax.data.sources import ArraySource

    for number, count in ((SMALL, SMALL), (SMALL + 1, SAMPLE)):
        seen = []
        source = ArraySource(np.zeros((number, 1, 1, 1), np.uint8), np.zeros(number, int), ["a"])
        check_examples(source, lambda image, seen=seen: seen.append(1) or image, "test")
        assert len(seen) == count


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_workdir_that_disappears_during_the_run(config, tmp_path, whole, monkeypatch, how):
    config.checkpoint.every = 4
    workdir = tmp_path / "run"

    def disappear():
        _wait_for(workdir / "checkpoints" / "4")  # it is saved in the background
        shutil.rmtree(workdir) if how == "removed" else workdir.rename(tmp_path / "elsewhere")

    _after(monkeypatch, 5, disappear)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be used: it, or its"):
        train(config, workdir)
    monkeypatch.undo()
    _goes_on(config, workdir, whole)


@pytest.mark.parametrize("step", [4, 12])
def test_a_workdir_that_is_moved_during_a_save(config, tmp_path, whole, monkeypatch, step):
    # The save in progress fails, which must not keep the last step from being saved; nor may it
    # leave a checkpoint without a state.
    from resnet_flax.training import checkpoint

    config.checkpoint.every = 4
    workdir, moved, ending = tmp_path / "run", threading.Event(), threading.Event()
    write, rescue, evaluate = checkpoint.write_sums, loop.rescue, loop._evaluate

    def move(path):
        if path.name.startswith(f"{step}.") and not moved.is_set():
            workdir.rename(tmp_path / "elsewhere")
            moved.set()
            assert ending.wait(300)
        write(path)

    def wait():
        assert moved.wait(300)

    monkeypatch.setattr(checkpoint, "write_sums", move)
    monkeypatch.setattr(loop, "rescue", lambda *given: ending.set() or rescue(*given))
    if step == 4:
        _after(monkeypatch, 4, wait)
    else:
        monkeypatch.setattr(loop, "_evaluate", lambda *given: wait() or evaluate(*given))
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be used: it.*\(step \d+ is saved"):
        train(config, workdir)
    assert _steps(workdir)[0] > 4
    for saved in _steps(workdir):
        assert read_meta(workdir / "checkpoints" / str(saved))["step"] == saved
    monkeypatch.undo()
    _goes_on(config, workdir, whole)


@pytest.mark.parametrize("content", ["[1, 2]", "7", '{"step": 12, "split": "val"}', "\0\0"])
def test_results_that_another_program_wrote_over_are_written_again(
    config, tmp_path, whole, content
):
    train(config, tmp_path / "run")
    for name in ("result.json", "sessions.json"):
        (tmp_path / "run" / name).write_text(content)
    _goes_on(config, tmp_path / "run", whole)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["step"], result["count"]) == (12, 24)


@pytest.mark.parametrize("ends", ["well", "full"])
def test_training_continues_while_the_disk_is_full_if_that_is_wanted(
    config, disk, whole, monkeypatch, capsys, ends
):
    config.checkpoint.every, config.checkpoint.on_failure = 4, "continue"
    config.log.every = 1
    workdir, filler = disk / "run", disk / "filler"

    def fill():
        _wait_for(workdir / "checkpoints" / "4")  # it is saved in the background
        with contextlib.suppress(OSError), filler.open("wb", 0) as file:
            while True:
                file.write(b"x" * 4096)

    def empty():
        if ends == "well":
            filler.unlink()

    _after(monkeypatch, 5, fill)
    _after(monkeypatch, 10, empty)
    if ends == "well":
        train(config, workdir)
    else:
        with pytest.raises(UserError, match="No space left on device"):
            train(config, workdir)
    shown = capsys.readouterr().out
    assert f"step 8 in {workdir / 'checkpoints'}: No space left on device; training" in shown
    if ends == "full":
        assert _steps(workdir) == [4]
        filler.unlink()
        monkeypatch.undo()
        _goes_on(config, workdir, whole)
    assert _digests(workdir) == whole[1]
    records = read_metrics(workdir / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, 13))


def _timeless(workdir):
    """The records without what depends on time."""
    timed = ("images_per_second", "data_wait")
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def test_records_are_of_the_same_steps_though_a_run_is_interrupted_between(
    config, tmp_path, monkeypatch
):
    config.log.every = 5
    train(config, tmp_path / "whole")
    _after(monkeypatch, 7, lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(config, tmp_path / "run")
    assert _steps(tmp_path / "run") == [7]
    monkeypatch.undo()
    train(config, tmp_path / "run")
    assert _timeless(tmp_path / "run") == _timeless(tmp_path / "whole")

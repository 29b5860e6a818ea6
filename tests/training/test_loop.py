"""Runs from beginning to end, interrupted in various ways, and errors for bad input."""

import json
import os
import re
import shutil
import signal
import time
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import TINY, final_digests, short_run
from marks import long
from PIL import Image

from resnet_flax import sharding
from resnet_flax.apply.experiment import make_run, train
from resnet_flax.apply.tables import check
from resnet_flax.data.experiment import make_preprocessing
from resnet_flax.data.pipeline import train_batches
from resnet_flax.data.sources import open_source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.result import Result
from resnet_flax.ops import conv2d
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.storage.lock import Lock
from resnet_flax.sweep import sweep
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.checkpoint_files import SUMS, read_meta, read_state
from resnet_flax.training.session import Interrupted
from resnet_flax.training.writers import read_metrics
from resnet_flax.weights.loading import load

SHORT = (
    "--config.model.name=cifar_resnet8",
    f"--config.model.overrides={TINY}",
    "--config.steps=60",
    "--config.optim.warmup_steps=10",
    "--config.checkpoint.every=10",
    "--config.eval.every=20",
    "--config.log.every=5",
    "--config.log.tensorboard=false",
)


TIMES = ("images_per_second", "data_wait")


def _timeless(workdir):
    """The metrics without what differs from run to run."""
    records = read_metrics(workdir / "metrics.jsonl")
    keys = [(record["split"], record["step"]) for record in records]
    assert len(keys) == len(set(keys)), "a step is recorded twice"
    return {
        key: {name: value for name, value in record.items() if name not in TIMES}
        for key, record in zip(keys, records, strict=True)
    }


def _wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command):
    """The workdir and the output of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = command(*SHORT, f"--workdir={workdir}")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return workdir, out


def _records(workdir, split):
    return {r["step"] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == split}


def _kill_and_go_on(command, workdir, moment, *more):
    process = command(*SHORT, f"--workdir={workdir}", *more)
    _wait_for(lambda: moment(workdir), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = Checkpoints(workdir / "checkpoints", keep=1).steps()
    assert 60 not in killed_at
    again = command(*SHORT, f"--workdir={workdir}", *more)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert ("continues at step" in out) == bool(killed_at)
    return out


def test_killed_in_an_epoch_it_ends_with_the_same_bits(command, tmp_path, uninterrupted):
    _kill_and_go_on(command, tmp_path / "run", lambda w: 15 in _records(w, "train"))
    assert final_digests(tmp_path / "run") == final_digests(uninterrupted[0])
    assert _timeless(tmp_path / "run") == _timeless(uninterrupted[0])


@pytest.mark.long
def test_killed_in_a_save_it_ends_with_the_same_bits(command, tmp_path, uninterrupted):
    def saving(workdir):
        return any((workdir / "checkpoints").glob("[3-9]0.*tmp*"))

    _kill_and_go_on(command, tmp_path / "run", saving)
    assert final_digests(tmp_path / "run") == final_digests(uninterrupted[0])
    assert _timeless(tmp_path / "run") == _timeless(uninterrupted[0])


@pytest.mark.long
def test_killed_in_an_evaluation_it_ends_with_the_same_bits(command, tmp_path, uninterrupted):
    # One example per batch, so that an evaluation takes a while. The record of training at step
    # 40 is written right before that of evaluation.
    more = "--config.data.eval_batch_size=1"
    during = []

    def evaluating(workdir):
        if 40 in _records(workdir, "train"):
            time.sleep(0.05)
            during.append(40 not in _records(workdir, "test"))
            return True
        return False

    _kill_and_go_on(command, tmp_path / "run", evaluating, more)
    assert during == [True]
    assert final_digests(tmp_path / "run") == final_digests(uninterrupted[0])
    trained = {key: value for key, value in _timeless(tmp_path / "run").items() if "train" in key}
    assert trained.items() <= _timeless(uninterrupted[0]).items()


def test_the_last_lines_say_the_error_and_where_things_are(uninterrupted):
    workdir, out = uninterrupted
    lines = out.splitlines()[-3:]
    assert lines[0] == f"curves: {workdir / 'curves.png'}"
    assert lines[1] == f"checkpoints: {workdir / 'checkpoints'}"
    record = read_metrics(workdir / "metrics.jsonl")[-1]
    assert lines[2].startswith(f"test error: {100 * record['error']:.2f} % (")
    with Image.open(workdir / "curves.png") as picture:
        assert picture.size[0] > 800
    assert json.loads((workdir / "config.json").read_text())["steps"] == 60


def test_a_finished_run_says_so_and_evaluates(command, uninterrupted, tmp_path):
    workdir, first = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    before = _timeless(workdir)
    again = command(*SHORT, f"--workdir={tmp_path / 'run'}")
    out, err = again.communicate()
    assert (again.returncode, err) == (0, "")
    assert "is finished at step 60 of 60" in out
    assert out.splitlines()[-1] == first.splitlines()[-1]
    assert _timeless(tmp_path / "run") == before


@pytest.mark.parametrize("number", [signal.SIGTERM, long(signal.SIGINT)])
def test_a_signal_saves_at_the_next_step_and_says_how_to_go_on(
    command, tmp_path, uninterrupted, number
):
    workdir = tmp_path / "run"
    flags = (*SHORT, f"--workdir={workdir}", "--config.checkpoint.every=0")
    process = command(*flags)
    _wait_for(lambda: 5 in _records(workdir, "train"), process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    saved = Checkpoints(workdir / "checkpoints", keep=1).steps()
    assert len(saved) == 1
    assert 5 <= saved[0] < 60
    assert err == (
        f"stopped by {number.name} at step {saved[0]}, which is saved in {workdir}; "
        "run the same command again to continue\n"
    )
    again = command(*flags)
    out, err = again.communicate()
    assert (again.returncode, err) == (0, "")
    assert f"continues at step {saved[0]} of 60" in out
    assert final_digests(workdir) == final_digests(uninterrupted[0])


@pytest.mark.long
def test_a_signal_in_an_evaluation_saves_too(command, tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    flags = (*SHORT, f"--workdir={workdir}", "--config.data.eval_batch_size=1")
    process = command(*flags, "--config.checkpoint.every=0")
    _wait_for(lambda: 40 in _records(workdir, "train"), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 40, which is saved" in err
    assert 40 not in _records(workdir, "test")
    again = command(*flags)
    assert again.wait() == 0
    assert {20, 40, 60} == _records(workdir, "test")
    assert final_digests(workdir) == final_digests(uninterrupted[0])


@pytest.mark.long
def test_it_learns_and_bfloat16_does_as_well(config, tmp_path):
    config.model.overrides = ""
    config.steps, config.eval.every, config.checkpoint.every = 100, 0, 0
    results = {}
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        results[dtype] = train(config, tmp_path / dtype)
        assert results[dtype].count == 360
    errors = {dtype: result.error for dtype, result in results.items()}
    assert errors["float32"] != errors["bfloat16"] or (
        results["float32"].loss != results["bfloat16"].loss
    )
    assert max(errors.values()) < 0.2  # 0.9 is chance


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The workdir and the result of a run of `config`."""
    config = short_run(data_dir)
    config.log.tensorboard = True
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, train(config, workdir)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of that run, to continue."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_tensorboard_gets_what_the_file_gets(finished):
    from tensorboardX.proto.event_pb2 import Event

    workdir, _ = finished
    (file,) = (workdir / "tensorboard").iterdir()
    data, seen = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            seen[value.tag, event.step] = value.simple_value
        data = data[16 + length :]
    for (split, step), record in _timeless(workdir).items():
        assert seen[f"{split}/loss", step] == pytest.approx(record["loss"], rel=1e-6)


def test_another_config_s_checkpoint_is_refused_and_left(config, workdir):
    before = sorted(map(str, workdir.rglob("*")))
    config.optim.momentum = 0.8
    config.data.pad = 0
    with pytest.raises(UserError, match=r"data.pad is 0 but was 1, optim.momentum is 0.8 but was"):
        train(config, workdir)
    assert sorted(map(str, workdir.rglob("*"))) == before


def test_keys_that_are_safe_may_differ(config, workdir):
    config.steps = 14
    config.mesh.fsdp = 2
    config.log.every = 3
    config.checkpoint.keep = 1
    train(config, workdir)
    assert final_digests(workdir)[0] == 14


def test_another_number_of_steps_than_planned_is_noted(config, workdir, capsys):
    config.steps = 14
    train(config, workdir)
    note = "note: the run was planned for 12 steps; optim.schedule=cosine depends on their number"
    assert note in capsys.readouterr().out
    train(config, workdir)
    assert "planned" not in capsys.readouterr().out


def test_fewer_steps_than_done_are_refused(config, workdir):
    config.steps = 8
    with pytest.raises(UserError, match="has a run of 12 steps, more than steps=8"):
        train(config, workdir)


@pytest.mark.parametrize("rate", [1e38, 1e3])  # parameters, and running variances, overflow
def test_divergence_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, rate):
    config.optim.learning_rate = rate
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 6 if rate > 1e10 else 0
    config.optim.weight_decay = 0.0
    config.checkpoint.every = 1
    config.checkpoint.keep = 100
    config.eval.every = 0
    with pytest.raises(UserError, match=r"training diverged at step \d+ \(loss") as error:
        train(config, tmp_path / "run")
    diverged = int(re.search(r"at step (\d+)", str(error.value))[1])
    steps = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps()
    assert steps == list(range(diverged - 1, 0, -1))
    for step in steps:
        path = tmp_path / "run" / "checkpoints" / str(step)
        state = read_state(path, jax.eval_shape(make_run(config).programs.init, 0), read_meta(path))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_an_evaluation_that_is_not_finite_ends_the_run_after_saving(config, tmp_path, monkeypatch):
    # Running statistics can be unusable though the batch's are not.
    monkeypatch.setattr(
        "resnet_flax.training.loop.evaluate",
        lambda *_, **__: Result(360, 0.9, 0.5, float("nan"), 0.1, (360,), (324,)),
    )
    with pytest.raises(UserError, match=r"evaluation at step 4 gave a loss of nan, .*is saved in"):
        train(config, tmp_path / "run")
    assert _records(tmp_path / "run", "test") == set()
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=1).steps() == [4]


def test_a_signal_before_the_first_step_is_heard(config, tmp_path):
    config.steps = 5
    for _ in range(2):
        with SignalHandler() as stop:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Interrupted, match="by SIGINT before the first step; run"):
                train(config, tmp_path / "run", stop)
    train(config, tmp_path / "run")


def test_a_second_run_or_sweep_in_a_workdir_is_refused(config, tmp_path):
    with Lock(tmp_path):
        with pytest.raises(UserError, match=f"in use by a run that process {os.getpid()} on"):
            train(config, tmp_path)
        with pytest.raises(UserError, match=f"in use by a run that process {os.getpid()} on"):
            sweep(config, [0], tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "seed0").exists()


def test_file_digests_follow_a_save_at_once(config, tmp_path):
    # Not only at the next save: after a crash in between the newest one would lack it.
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, {"x": np.ones(3)}, {})
        deadline = time.monotonic() + 60
        while not (tmp_path / "checkpoints" / "1" / SUMS).exists():
            checkpoints.poll()
            assert time.monotonic() < deadline


def test_several_processes_finish_a_save_when_all_see_its_end(config, tmp_path, monkeypatch):
    # Not each of them when it sees that: a barrier of one, and a step of another, would wait for
    # each other.
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"x": np.ones(3)}, {})
        checkpoints.wait()
        checkpoints.save(2, {"x": np.ones(3)}, {})
        deadline = time.monotonic() + 200
        while checkpoints._manager.is_saving_in_progress():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with monkeypatch.context() as patched:  # another process does not see it yet
            patched.setattr("resnet_flax.runtime.distributed.all_max", lambda number: 1)
            checkpoints.poll()
        assert checkpoints.steps() == [2, 1]
        checkpoints.poll()
        assert checkpoints.steps() == [2]


def test_evaluating_the_training_split_is_recorded_beside_training(config, tmp_path):
    config.data.eval_split = "train"
    train(config, tmp_path / "run")
    assert _records(tmp_path / "run", "train (evaluated)") == {4, 8, 12}
    assert _records(tmp_path / "run", "train") == {2, 4, 6, 8, 10, 12}


@pytest.mark.long
def test_seed_and_augmentation_reach_the_run(config):
    def first(**changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        run = make_run(changed)
        state = run.programs.init(changed.seed)
        with train_batches(run.train_source, seed=0, batch_size=config.batch_size) as batches:
            batch = sharding.put_batch(next(batches), run.mesh)
        kernel = np.asarray(state.params["stem"]["conv1"]["kernel"])
        return kernel, float(run.programs.train_step(state, batch, 0)[1]["loss"])

    kernel, loss = first()
    assert (first(seed=1)[0] != kernel).any()
    for changes in ({"data.pad": 0}, {"data.flip": True}, {"optim.label_smoothing": 0.1}):
        same, other = first(**changes)
        assert (same == kernel).all()
        assert other != loss


def test_a_share_of_the_training_split_is_held_out(config, tmp_path):
    config.data.holdout = 0.1
    config.data.eval_split = "holdout"
    config.steps = config.eval.every = 5
    assert train(config, tmp_path / "run").count == 144
    assert len(make_run(check(config)).train_source) == 1437 - 144
    assert _records(tmp_path / "run", "holdout") == {5}


def test_a_line_of_config_is_another_network(config):
    config.model.overrides = (
        "stage_sizes=1,3,1 stage_features=8,16,32 stem_features=8 shortcut=B se_ratio=4"
    )
    config.model.scan = True
    config.model.remat = 2
    run = make_run(config)
    names = set(run.programs.shardings.params)
    assert {"stage1_block1", "stage2_blocks", "stage3_block1"} < names
    assert "conv" in run.programs.shardings.params["stage2_block1"]["shortcut"]
    assert "se" in run.programs.shardings.params["stage2_blocks"]
    state = run.programs.init(0)
    with train_batches(run.train_source, seed=0, batch_size=config.batch_size) as batches:
        batch = sharding.put_batch(next(batches), run.mesh)
    state, sums = run.programs.train_step(state, batch, 0)
    assert np.isfinite(sums["loss"])
    assert int(state.step) == 1


def test_a_workdir_with_odd_things_in_it(config, workdir):
    directory = workdir / "checkpoints"
    (directory / "12" / ".DS_Store").write_text("")
    (directory / "013").mkdir()
    (directory / "notes.txt").write_text("")
    (directory / "9.orbax-checkpoint-tmp").mkdir()
    config.steps = 16
    train(config, workdir)
    assert final_digests(workdir)[0] == 16
    assert not (workdir / "damaged").exists()
    assert not (directory / "9.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 30}, "batch_size 30 cannot be divided over 8 devices; .* such as 32"),
        ({"data.eval_batch_size": 9}, "eval batch size 9 cannot be divided over 8 devices"),
        ({"batch_size": 2000}, "batch_size=2000 is more than the 1437 training examples"),
        ({"mesh.data": 3}, "mesh.data=3, mesh.fsdp=1 does not fit 8 devices"),
        ({"data.mean": (0.1, 0.2, 0.3)}, "data.mean has 3 numbers, but the images .* 1 channel"),
        ({"model.name": "resnet"}, "no model called 'resnet'"),
        (
            {"model.overrides": "stem=dep"},
            "stem in model.overrides must be one of cifar, imagenet, deep, not 'dep'",
        ),
        ({"model.overrides": "scan=True"}, "model.overrides cannot set scan"),
        ({"data.source": "tfds:digitz"}, "no data set called 'digitz'"),
    ],
)
def test_what_does_not_fit_is_explained(config, tmp_path, settings, message):
    for key, value in settings.items():
        group, _, leaf = key.rpartition(".")
        (config[group] if group else config)[leaf] = value
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_statistics_are_averaged_anew_over_training_batches(config, tmp_path):
    config.eval.recompute_bn = 3
    config.data.flip = False
    config.data.pad = 0
    result = train(config, tmp_path / "again")
    state = load(tmp_path / "again").variables
    # The stem's first normalisation, by definition, over the batches 12, 13, 14.
    source = open_source("tfds:digits", "train", config.data.data_dir)
    means, variances = [], []
    with train_batches(source, seed=config.seed, batch_size=config.batch_size, start=12) as batches:
        for batch in islice(batches, 3):
            x = make_preprocessing(config.data).normalize(jnp.asarray(batch["image"]))
            y = np.asarray(conv2d(x, state["params"]["stem"]["conv1"]["kernel"], padding=PAD))
            means.append(y.mean((0, 1, 2)))
            variances.append(y.var((0, 1, 2)))
    stem = state["batch_stats"]["stem"]["norm1"]
    np.testing.assert_allclose(stem["mean"], np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stem["var"], np.mean(variances, 0), rtol=1e-4)
    # The run is finished, so it evaluates what it saved.
    assert train(config, tmp_path / "again") == result


PAD = ((1, 1), (1, 1))


def test_accumulation_is_the_batch_s_with_groups_and_warned_of_without(config, tmp_path, capsys):
    config.model.bn_group_size = "8"
    config.batch_size = 32
    config.steps, config.optim.warmup_steps, config.eval.every = 3, 1, 0
    whole = train(config, tmp_path / "whole")
    config.accumulation = 4
    capsys.readouterr()
    parts = train(config, tmp_path / "parts")
    assert "warning" not in capsys.readouterr().out
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3)
    config.model.bn_group_size = "global"
    other = train(config, tmp_path / "global")
    assert (
        "warning: with accumulation=4 batch normalisation averages over each microbatch of 8"
        in (capsys.readouterr().out)
    )
    assert abs(other.loss - whole.loss) > 1e-4 * whole.loss
    config.accumulation = 3
    with pytest.raises(UserError, match="batch_size=32 must be a multiple of accumulation=3"):
        train(config, tmp_path / "none")


def test_a_finished_run_says_where_its_result_comes_from(config, finished, workdir):
    result = finished[1]
    path = workdir / "result.json"
    written = json.loads(path.read_text())
    assert written["step"] == 12
    assert (written["errors"], written["count"]) == (result.errors, 360)
    assert written["config"]["model.name"] == "cifar_resnet8"
    assert {"commit", "device", "versions"} <= set(written)
    # If another commit, with another rounding, finds it finished, the result is kept; if it
    # continues, both commits are recorded.
    before = {**written, "commit": "before", "loss": written["loss"] * (1 + 1e-9)}
    path.write_text(json.dumps(before))
    sessions = workdir / "sessions.json"
    # Its name in runs before 2026-11-28.
    old = sessions.read_text().replace(written["commit"], "before")
    sessions.rename(workdir / "sittings.json").write_text(old)
    kept = path.read_text()
    train(config, workdir)
    assert path.read_text() == kept
    config.steps = 16
    train(config, workdir)
    after = json.loads(path.read_text())
    assert after["step"] == 16
    assert after["commit"] == written["commit"]
    assert [(s["from_step"], s["commit"]) for s in after["sessions"]] == [
        (0, "before"),
        (12, written["commit"]),
    ]


def test_that_devices_normalize_other_parts_from_here_on_is_said(
    config, tmp_path, capsys, monkeypatch
):
    config.model.bn_group_size = "device"
    config.optim.warmup_steps, config.steps = 0, 4
    train(config, tmp_path / "run")
    assert "note: the run had" not in capsys.readouterr().out
    two = sharding.make_mesh(devices=jax.devices()[:2])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: two)
    config.steps = 8
    train(config, tmp_path / "run")
    assert "note: the run had 8 devices and has 2 now; with model.bn" in capsys.readouterr().out

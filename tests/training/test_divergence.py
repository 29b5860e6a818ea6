"""Going back after training diverged: batches are left out, or the learning rate is lowered."""

import errno
import json
import os
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import final_digests, short_run

from resnet_flax import sharding
from resnet_flax.apply import tables
from resnet_flax.apply.experiment import make_run, train
from resnet_flax.data import pipeline
from resnet_flax.data.sampler import Sampler
from resnet_flax.errors import UserError
from resnet_flax.keys import Entry
from resnet_flax.training import loop
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.checkpoint_files import read_meta, read_state
from resnet_flax.training.digests import digests
from resnet_flax.training.divergence import (
    NONE,
    DivergedError,
    Recoveries,
    Recovery,
    describe,
    diverged,
)
from resnet_flax.training.losses import LOSSES, cross_entropy
from resnet_flax.training.writers import read_metrics

BATCH, SEED = 8, 3


@pytest.fixture
def config(data_dir):
    """A run of ten steps with checkpoints at 4 and 8, whose learning rate is constant."""
    config = short_run(data_dir)
    config.batch_size, config.seed, config.steps = BATCH, SEED, 10
    config.optim.schedule, config.optim.learning_rate, config.optim.warmup_steps = (
        "constant",
        0.1,
        0,
    )
    config.eval.every, config.data.eval_batch_size, config.log.every = 0, 360, 1
    return config


@pytest.fixture
def poison(monkeypatch, config):
    """Makes a loss that is not finite on certain batches of the training data."""

    def make(*numbers):
        source = make_run(tables.check(config)).train_source
        bad = [
            jnp.asarray(
                [
                    source[int(i)]["label"]
                    for i in Sampler(len(source), SEED).examples(number * BATCH, BATCH)
                ]
            )
            for number in numbers
        ]

        def loss(logits, targets):
            found = jnp.any(jnp.stack([(targets == one).all() for one in bad]))
            return cross_entropy(logits, targets) * jnp.where(found, jnp.nan, 1)

        monkeypatch.setitem(LOSSES, "poisoned", Entry(lambda optim: loss))
        config.optim.loss = "poisoned"

    return make


def _sessions(workdir):
    return json.loads((workdir / "sessions.json").read_text())


@pytest.mark.parametrize("resident", [False, True])
def test_batches_since_the_checkpoint_are_left_out(
    config, poison, tmp_path, monkeypatch, capsys, resident
):
    poison(5)
    config.optim.on_divergence, config.checkpoint.keep = "skip_batches", 9
    config.data.resident, config.eval.recompute_bn = resident, 2
    checked, workdir = tables.check(config), tmp_path / "run"
    opened = []
    true = pipeline.train_batches

    def spied(*given, **settings):
        opened.append((settings["start"], settings["data_offset"]))
        return true(*given, **settings)

    monkeypatch.setattr("resnet_flax.training.run.train_batches", spied)
    train(config, workdir)
    said = capsys.readouterr().out
    assert "training diverged at step 6 (loss nan" in said
    assert "continues from step 4 with 2 batches left out so far\n" in said
    # The batches over which the statistics are recomputed come after those of training.
    assert opened == [(10, 2)] if resident else [(0, 0), (4, 2), (10, 2)]

    # The same steps by hand, on batches 6 to 9.
    run, path = make_run(checked), workdir / "checkpoints"
    state = read_state(path / "4", jax.eval_shape(run.programs.init, SEED), read_meta(path / "4"))
    with true(run.train_source, seed=SEED, batch_size=BATCH, start=6) as batches:
        for _ in range(4):
            batch = sharding.put_batch(next(batches), run.mesh)
            state, _ = run.programs.train_step(state, batch, np.int32(SEED))
    meta = read_meta(path / "8")
    assert meta["digests"] == digests(state)
    assert (meta["data_offset"], meta["rate_factor"]) == (2, 1.0)

    records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r.get("data_offset", 0) for r in records] == [0] * 4 + [2] * 6
    recovered = _sessions(workdir)[-1]["recovered"]
    assert (recovered["diverged_at"], recovered["data_offset"]) == (6, 2)
    assert json.loads((workdir / "result.json").read_text())["sessions"][-1]["recovered"]


@pytest.mark.long
def test_an_interrupted_run_leaves_out_the_same_batches(config, poison, tmp_path):
    poison(5, 13)  # the second time at step 12, after a checkpoint with an offset
    config.optim.on_divergence, config.steps, config.checkpoint.keep = "skip_batches", 14, 9
    train(config, tmp_path / "whole")
    # Ending at step 10 leaves a checkpoint there, to which no other run returns.
    for steps in (9, 10, 14):
        config.steps = steps
        train(config, tmp_path / "parts")
    assert final_digests(tmp_path / "parts") == final_digests(tmp_path / "whole")
    last = read_meta(tmp_path / "whole" / "checkpoints" / "14")
    assert last["data_offset"] == 2 + 4
    # The checkpoint of step 10, from before going back, cannot be continued from any more.
    assert Checkpoints(tmp_path / "parts/checkpoints", keep=1).steps() == [14, 12, 8, 4]
    # The key may differ, but the offset remains.
    config.optim.on_divergence, config.steps = "stop", 15
    train(config, tmp_path / "parts")
    assert read_meta(tmp_path / "parts/checkpoints/15")["data_offset"] == 2 + 4


@pytest.mark.long
def test_a_lower_rate_is_taken_from_the_newest_checkpoint_on(config, tmp_path, capsys):
    config.optim.learning_rate, config.optim.divergence_factor = 1e30, 1e-16
    config.optim.on_divergence, config.steps, config.checkpoint.every = "lower_rate", 5, 2
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "continues from step 0 with all learning rates multiplied by 1e-16\n" in said
    assert "multiplied by 1e-32" in said
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["split"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert all(r["learning_rate"] == pytest.approx(0.01, rel=1e-6) for r in records)
    factors = [session["recovered"]["rate_factor"] for session in _sessions(tmp_path / "run")[1:]]
    assert factors == pytest.approx([1e-16, 1e-32])

    # Whoever continues does so with the lowered rate, and the steps are those of such a rate.
    config.steps = 7
    train(config, tmp_path / "run")
    config.optim.learning_rate = 0.01
    train(config, tmp_path / "from_the_start")
    rates = {r.get("learning_rate") for r in read_metrics(tmp_path / "run/metrics.jsonl")[-3:-1]}
    assert rates == {records[0]["learning_rate"]}
    target = jax.eval_shape(make_run(tables.check(config)).programs.init, SEED)
    one, other = (
        read_state(path / "7", target, read_meta(path / "7"))
        for path in (tmp_path / "run/checkpoints", tmp_path / "from_the_start/checkpoints")
    )
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_it_ends_after_some_returns_to_the_same_checkpoint(config, tmp_path):
    config.optim.learning_rate, config.optim.on_divergence = 1e30, "lower_rate"
    config.optim.divergence_retries = 2
    message = r"at step \d .*; it has returned to step 0 2 times, as .* allows; start again in"
    with pytest.raises(DivergedError, match=message):
        train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run/checkpoints", keep=1).steps() == []


def test_by_default_it_stops_and_says_how_to_continue(config, poison, tmp_path):
    poison(5)
    with pytest.raises(UserError, match=r"continue .* --config.optim.on_divergence=s") as error:
        train(config, tmp_path / "run")
    assert error.value.__cause__ is None
    config.optim.on_divergence = "skip_batches"
    train(config, tmp_path / "run")
    assert final_digests(tmp_path / "run")[0] == 10


def test_a_damaged_checkpoint_is_named_when_going_back(
    config, poison, tmp_path, monkeypatch, capsys
):
    poison(9)
    config.optim.on_divergence, called = "skip_batches", []
    true = loop.restore_or_init

    def damaging(*given):
        called.append(None)
        if len(called) == 2:
            (tmp_path / "run/checkpoints/8/meta/metadata").write_text("{}")
        return true(*given)

    monkeypatch.setattr(loop, "restore_or_init", damaging)
    train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert re.search(r"checkpoint .*/8 is damaged", said)
    assert "it continues from step 4 with 6 batches left out so far\n" in said


def test_a_save_that_fails_while_training_diverges_stops_the_run(
    config, poison, tmp_path, monkeypatch
):
    poison(5)
    config.optim.on_divergence, ending = "skip_batches", threading.Event()
    rescue = loop.rescue

    def fail(path):
        assert ending.wait(300)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("resnet_flax.training.checkpoint.write_sums", fail)
    monkeypatch.setattr(loop, "rescue", lambda *given: ending.set() or rescue(*given))
    message = r"cannot save the checkpoint of step 4 .*; besides, training diverged at step 6"
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_the_state_that_diverged_takes_no_memory(config, poison, tmp_path, monkeypatch):
    poison(5)
    config.optim.on_divergence = "skip_batches"
    before, alive = {id(array) for array in jax.live_arrays()}, []
    true = loop.restore_or_init

    def counted(*given):
        alive.append(sum(a.nbytes for a in jax.live_arrays() if id(a) not in before))
        return true(*given)

    monkeypatch.setattr(loop, "restore_or_init", counted)
    train(config, tmp_path / "run")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(make_run(config).initial_state()))
    assert len(alive) == 2
    assert alive[1] < alive[0] + size / 10


def test_offsets_add_up_over_several_returns(config):
    config.optim.on_divergence = "skip_batches"
    recoveries = Recoveries(config.optim)
    assert recoveries.begin(100, Recovery(5, 0.25)) == (Recovery(5, 0.25), {})
    for diverged_at, step, offset in ((130, 120, 15), (125, 120, 20), (127, 110, 37)):
        recoveries.note(diverged(diverged_at, "loss nan", "stop"))
        # What a checkpoint from before the divergence says does not matter.
        recovery, recovered = recoveries.begin(step, Recovery(5, 0.25))
        assert recovery == Recovery(offset, 0.25)
        assert f"step {diverged_at} (loss nan); it continues from step {step}" in describe(
            step, recovered
        )
    assert recoveries.begin(100, NONE) == (NONE, {})


def test_sizes_of_images_depend_on_steps_and_examples_on_the_data():
    asked = []

    def transform(image, rng, step):
        asked.append((int(image[0, 0, 0]), step))
        return image

    class Source:
        class_names = ("a",)

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {"image": np.full((2, 2, 1), index, np.uint8), "label": 0}

    shares = pipeline.TrainShares(Source(), Sampler(12, 0), transform, 4, 0, 1, 1, data_offset=1)
    shares[0]
    expected = Sampler(12, 0).examples(8, 4)
    assert asked == [(index, 1) for index in expected]

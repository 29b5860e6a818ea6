"""Every config key that may differ when a run continues: what that changes, decided key by key."""

import dataclasses
import shutil

import numpy as np
import pytest

from resnet_flax.apply import tables
from resnet_flax.apply.experiment import make_run, train
from resnet_flax.apply.tables import keys
from resnet_flax.config import conflicts, flatten
from resnet_flax.training import resume_notes
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.writers import read_metrics

# Another value of each: the state after the last step, and what records say of steps that both
# runs record, are the same bits.
NOTHING = {
    "steps": 6,  # see test_a_schedule_that_depends_on_the_number_of_steps_is_noted
    "data.in_memory": True,
    "data.workers": 1,
    "data.timeout": 200.0,
    "data.accept_changes": True,  # what it accepts is said, see test_data_changes.py
    "data.data_dir": "COPY",
    # What these do when training diverges is said and recorded, see test_divergence.py.
    "optim.on_divergence": "skip_batches",
    "optim.divergence_factor": 0.25,
    "optim.divergence_retries": 5,
    "eval.metrics": "balanced_error",
    "eval.every": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "checkpoint.on_failure": "continue",
    "log.every": 1,  # a record averages the steps since the one before
    "log.tensorboard": True,
    "log.progress": False,
}
# Another value of each, and what a run that continues with it says.
NOTED = {
    "data.eval_split": ("train", "note: evaluations are on the split 'train' from here on; they"),
    "data.eval_batch_size": (64, "note: data.eval_batch_size is 64 but was 128; numbers are add"),
    "data.resident": (True, "note: data.resident is True but was False; numbers are added in an"),
    "steps_per_dispatch": (2, "note: steps_per_dispatch is 2 but was 1; numbers are added in an"),
    "model.remat": (1, "note: model.remat is 1 but was 0; numbers are added in another order"),
    "mesh.data": (4, "note: mesh.data is 4 but was -1; numbers are added in another order, so"),
    "mesh.fsdp": (2, "note: mesh.fsdp is 2 but was 1; numbers are added in another order, so"),
}


def test_every_key_that_may_differ_is_decided():
    decided = [*NOTHING, *NOTED]
    safe = {key for key, entry in keys().items() if entry.resume_safe}
    assert sorted(decided) == sorted(safe)


def test_every_other_key_must_be_as_it_was(config):
    now = tables.check(config)
    for key, entry in keys().items():
        before = {**flatten(now), key: "something else"}
        assert list(conflicts(now, before, keys())) == ([] if entry.resume_safe else [key])


def _short(config):
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0
    config.eval.every, config.log.every = 2, 2
    config.steps, config.data.in_memory = 4, False
    return config


def _records(workdir):
    unsaid = {"images_per_second", "data_wait"}
    return {
        (record["split"], record["step"]): {k: v for k, v in record.items() if k not in unsaid}
        for record in read_metrics(workdir / "metrics.jsonl")
    }


def _digests(workdir, step):
    return read_meta(workdir / "checkpoints" / str(step))["digests"]


@pytest.mark.long
def test_the_first_ones_change_no_number(config, data_dir, tmp_path):
    config = _short(config)
    train(config, tmp_path / "half")
    config.steps = NOTHING["steps"]
    train(config, tmp_path / "whole")
    expected = _records(tmp_path / "whole")
    shutil.copytree(data_dir, tmp_path / "copy")
    changed = {**NOTHING, "data.data_dir": str(tmp_path / "copy")}
    same = [key for key, value in changed.items() if flatten(config)[key] == value]
    assert same == ["steps"]  # which was another one in the first half
    config.update_from_flattened_dict(changed)
    train(config, tmp_path / "half")
    assert _digests(tmp_path / "half", 6) == _digests(tmp_path / "whole", 6)
    found = _records(tmp_path / "half")
    for (split, step), record in expected.items():
        if split != "train" or step <= 4:
            assert {key: found[split, step][key] for key in record} == record
    last = [found["train", step] for step in (5, 6)]
    both = expected["train", 6]
    for name in ("loss", "error"):
        assert np.isclose(np.mean([record[name] for record in last]), both[name], rtol=1e-6)
    assert {key: last[1][key] for key in ("grad_norm", "param_norm")} == {
        key: both[key] for key in ("grad_norm", "param_norm")
    }


def _notes(run, before):
    """What `run` says if it continues from a checkpoint of the config `before`."""
    meta = {"config": flatten(before), "step": 2, "averaged": False}
    return resume_notes.notes(run, {**meta, "devices": run.about["devices"]})


@pytest.fixture(scope="module")
def run(data_dir):
    from experiments import short_run

    return make_run(tables.check(_short(short_run(data_dir))))


@pytest.mark.parametrize("key", NOTED)
def test_the_others_are_said(run, key):
    value, said = NOTED[key]
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    changed = dataclasses.replace(run, config=config)
    (note,) = _notes(changed, run.config)
    assert note.startswith(said)
    assert _notes(changed, config) == _notes(run, run.config) == []


def test_another_number_of_devices_is_said(run):
    meta = {"config": flatten(run.config), "step": 2, "devices": 3}
    (note,) = resume_notes.notes(run, meta)
    assert note.startswith("note: there are 8 devices but were 3; numbers are added in another")


@pytest.mark.parametrize(
    ("schedule", "depends"),
    [("constant", False), ("piecewise", False), ("cosine", True), ("onecycle", True)],
)
def test_a_schedule_that_depends_on_the_number_of_steps_is_noted(run, schedule, depends):
    before = run.config.copy_and_resolve_references()
    with before.unlocked():
        before.steps = 400
        before.optim.schedule, before.optim.boundaries = schedule, (300,)
    after = before.copy_and_resolve_references()
    with after.unlocked():
        after.steps = 900
    found = _notes(dataclasses.replace(run, config=after), before)
    assert len(found) == depends
    said = f"note: the run was planned for 400 steps; optim.schedule={schedule} depends on their"
    assert all(note.startswith(said) for note in found)


def test_statistics_that_were_recomputed_before_it_continues_are_said(run):
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.recompute_bn = 2
    longer = dataclasses.replace(run, config=config)
    for averaged in (False, True):
        meta = {"config": flatten(config), "step": 2, "averaged": averaged}
        found = resume_notes.notes(longer, meta)
        assert [note[:62] for note in found] == averaged * [
            "note: eval.recompute_bn has replaced the running statistics at"
        ]

"""benchmarks/faults.py causes faults for real, and its checks notice what a run has lost."""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from experiments import ROOT

from resnet_flax.training.digests import sha256_of

LEAVES = {"params/kernel": 1, "opt_state/trace": 2}


@pytest.fixture
def faults(monkeypatch):
    """Its modules, by the last word of their names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("session", "disk", "training", "run")
    found = {name: importlib.import_module(f"faults_{name}") for name in names}
    return SimpleNamespace(**found)


@pytest.fixture
def run(faults, tmp_path):
    """A run with checkpoints of the steps 5 and 10, in which nothing is lost."""
    training = faults.training.Training(tmp_path, tmp_path, float64=False)
    run = faults.run.Run(training, faults.disk.Disk(tmp_path, mounted=False), random.Random(0))
    run.workdir = tmp_path / "run"
    for step in (5, 10):
        _write_checkpoint(run.checkpoints / str(step), LEAVES)
        training.reference.digests[step] = LEAVES
    records = [{"split": "train", "step": step, "loss": 2.0 / step} for step in (3, 6, 9)]
    training.reference.records = {("train", r["step"]): r for r in records}
    _write_records(run, records)
    run.check(10)
    return run


def _write_checkpoint(path, digests):
    meta = {"format": 1, "step": int(path.name), "digests": digests, "config": {}}
    (path / "meta").mkdir(parents=True, exist_ok=True)
    content = json.dumps({**meta, "sha256": sha256_of(meta)})
    (path / "meta" / "metadata").write_text(content)


def _write_records(run, records):
    lines = [json.dumps({**record, "data_wait": random.random()}) for record in records]
    (run.workdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_checkpoint_that_is_lost_is_noticed(faults, run):
    shutil.rmtree(run.checkpoints / "10")
    run.check(5)
    with pytest.raises(faults.session.Unmet, match="newest checkpoint is of step 5, not of 10"):
        run.check(10)


@pytest.mark.parametrize("digests", [{**LEAVES, "opt_state/trace": 3}, {"params/kernel": 1}])
def test_a_parameter_that_differs_is_noticed(faults, run, digests):
    _write_checkpoint(run.checkpoints / "10", digests)
    with pytest.raises(faults.session.Unmet, match=r"have other bits: \['opt_state|other leaves"):
        run.check(10)


@pytest.mark.parametrize("change", ["missing", "twice", "changed", "of no step"])
def test_a_record_that_is_lost_or_changed_is_noticed(faults, run, change):
    records = list(run.training.reference.records.values())
    records[1:2] = {
        "missing": [],
        "twice": [records[1], records[1]],
        "changed": [{**records[1], "loss": 0.5}],
        "of no step": [records[1], {**records[1], "step": 7}],
    }[change]
    _write_records(run, records)
    words = {"missing": "are missing", "twice": "has two records"}.get(change, "the record of")
    with pytest.raises(faults.session.Unmet, match=words):
        run.check(10)


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("DIR continues at step 10 of 80", ""),
        ("DIR continues at step 5 of 80", "continued at step 5, not at 10"),
        ("", "did not say that it continues at step 10"),
        ("checkpoint DIR/checkpoints/10 is damaged: x\nDIR continues at step 5 of 80", "at step 5"),
        ("DIR continues at step 10 of 80\nTraceback (most recent call last)", "a traceback"),
    ],
)
def test_a_silent_restore_is_noticed(faults, run, monkeypatch, printed, words):
    session = SimpleNamespace(out=printed, errors=[""], trained=[12], ended_well=False)
    session.read = lambda: None
    monkeypatch.setattr(run.training, "session", lambda *_: session)
    run.start()
    if words:
        with pytest.raises(faults.session.Unmet, match=words):
            run.note(session)
    else:
        assert run.note(session)


def test_a_damaged_checkpoint_that_is_not_named_is_noticed(faults, run, monkeypatch):
    session = SimpleNamespace(errors=[""], trained=[7], ended_well=False, read=lambda: None)
    monkeypatch.setattr(run.training, "session", lambda *_: session)
    run.damaged.add(10)
    run.start()
    continues = "DIR continues at step 5 of 80\n"
    session.out = continues
    with pytest.raises(faults.session.Unmet, match=r"named the damaged checkpoints set\(\), not"):
        run.note(session)
    session.out = f"checkpoint DIR/checkpoints/10 is damaged: x\n{continues}"
    assert run.note(session)
    assert not run.damaged


def test_parameters_may_differ_by_rounding_only(faults):
    tree = {"a": np.full(100, 3.0), "b": np.zeros(2)}
    distance = faults.training.largest_distance
    other = {**tree, "a": tree["a"] * (1 + 1e-7 * np.eye(100)[0])}
    assert distance(other, tree) == pytest.approx(1e-8)  # of the leaf's norm
    with pytest.raises(faults.session.Unmet):
        distance({"a": tree["a"]}, tree)


@pytest.mark.parametrize("change", ["none", "another", "missing"])
def test_an_example_that_differs_is_noticed(faults, tmp_path, change):
    training = faults.training.Training(tmp_path, tmp_path, float64=True)
    training.reference.examples = {1: list(range(8))}
    # Once by one process; then again by two.
    parts = [(0, range(8)), (1, range(4, 8)), (0, range(4))]
    if change == "another":
        parts[1] = (1, (4, 5, 7, 6))
    elif change == "missing":
        del parts[0], parts[0]
    lines = [json.dumps({"step": 1, "process": p, "ids": list(ids)}) for p, ids in parts]
    (tmp_path / "run.examples").write_text("".join(f"{line}\n" for line in lines))
    if change == "none":
        training.same_examples(tmp_path / "run")
    else:
        with pytest.raises(faults.session.Unmet, match=r"other examples|not all examples"):
            training.same_examples(tmp_path / "run")


def test_the_page_has_every_kind(faults):
    kinds = {**importlib.import_module("faults_kinds").KINDS}
    kinds |= importlib.import_module("faults_files").CHANGES
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert [kind for kind in kinds if f"`{kind}`" not in page] == []


def test_the_page_has_the_count(faults):
    found = json.loads((ROOT / "results" / "faults.json").read_text())
    lost = sum(row["failed"] for row in found["kinds"].values())
    assert found["faults"] == found["passed"] + lost
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert f"{found['faults']:,} faults so far, {lost} promises not kept" in page


@pytest.mark.long
@pytest.mark.timeout(3600)  # five minutes on a machine with nothing else to do
def test_nothing_that_was_trained_is_lost(tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, "benchmarks/faults.py", "--faults=20", f"--out={out}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert (found["faults"], found["passed"], found["failures"]) == (20, 20, [])
    assert len(found["kinds"]) >= 15
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_kind_that_does_not_exist_is_said(faults, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["faults.py", "--kinds=fire"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("faults").main()
    assert "there is no kind 'fire'; they are kill, " in capsys.readouterr().err

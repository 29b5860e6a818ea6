"""`resnet-flax eval` in several processes, of a run that was trained sharded."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
import together
from experiments import TINY, short_run
from photographs import folder_run, make_folder

from resnet_flax.apply.experiment import train
from resnet_flax.cli import main
from resnet_flax.weights.loading import load

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def sharded(data_dir, tmp_path_factory):
    """The workdir of a run on a mesh of 4 x 2 devices."""
    config = short_run(data_dir)
    config.mesh.fsdp, config.data.holdout = 2, 0.25
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir


@pytest.fixture
def run():
    """Runs a verb in processes; returns what each printed."""
    running = []

    def start(n, *arguments, status=0, devices=2, each=()):
        program = ("-m", "resnet_flax", *arguments)
        started = together.start(running, n, *program, devices=devices, each=each)
        return together.ended(started, status)

    yield start
    together.kill(running)


# Numbers that depend on the order of a sum.
SUMS = ("negative_log_likelihood", "calibration_error")


def _result(path):
    """What was written except the devices; `SUMS` are apart."""
    found = json.loads(path.read_text())
    del found["device"]
    return {k: v for k, v in found.items() if k not in SUMS}, [found[name] for name in SUMS]


GLOO = ("Gloo", "peer ranks")  # it prints a line in pieces, from several threads


def _said(printed):
    """The lines that were printed, without those of `SUMS` and of Gloo, which may be torn."""
    besides = (*GLOO, *(name.replace("_", " ") for name in SUMS))
    return [line for line in printed.splitlines() if not any(one in line for one in besides)]


@pytest.mark.parametrize(
    "flags",
    [
        ("--confusion={}/matrix.csv", "--metrics", "balanced_error"),
        ("--protocol=ten_crop", "--size=6", "--crop_fraction=0.75"),
        ("--protocol=multiscale", "--scales=8,12", "--batch_size=64"),
        ("--ensemble={run}",),
        ("--split=holdout",),
    ],
)
def test_two_processes_count_every_image_once_and_the_first_reports(sharded, run, tmp_path, flags):
    results, matrices = [], []
    for n, devices in ((1, 1), (2, 2)):
        here = tmp_path / str(n)
        filled = [flag.format(here, run=sharded) for flag in flags]
        printed = run(n, "eval", sharded, f"--out={here}/x.json", *filled, devices=devices)
        results.append(_result(here / "x.json"))
        matrices += [path.read_text() for path in here.glob("*.csv")]
        assert [path.name for path in sorted(here.iterdir())][-1] == "x.json"
        outs = [out.replace(str(here), "") for out, _ in printed]
        results[-1] += (_said(outs[0]),)
        assert not any(line.strip() for out in outs[1:] for line in _said(out))
    (alone, sums, said), (several, their_sums, they_said) = results
    assert several == alone
    assert alone["count"] == (359 if alone["split"] == "holdout" else 360)
    assert their_sums == pytest.approx(sums, rel=1e-5)
    assert they_said == said
    assert len(set(matrices)) == (1 if matrices else 0)


def test_processes_that_evaluate_something_else_are_named(sharded, run):
    def errors(*second):
        printed = run(2, "eval", sharded, each=((), second), status=2)
        assert not any("Traceback" in error for _, error in printed)
        return [error.splitlines()[-1] for _, error in printed]

    for said in errors("--protocol=multiscale"):
        assert said.startswith("error: process 1 of 2 was started with another command than proce")
    first, second = errors("--data=folder:/none")
    assert first == "error: another process cannot open its model or its data; see its error"
    assert "/none" in second


def test_a_sharded_run_is_exported_and_loaded_whole(sharded, tmp_path):
    found = load(sharded)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(found.variables)} == {1}
    assert main(["export", str(sharded), f"{tmp_path}/x.safetensors"]) == 0
    again = load(tmp_path / "x.safetensors")
    same = jax.tree.map(np.array_equal, found.variables, again.variables)
    assert all(jax.tree.leaves(same))


def test_two_processes_start_from_the_weights_of_a_sharded_run(sharded, run, data_dir, tmp_path):
    flags = (
        *("--config.model.name=cifar_resnet8", f"--config.model.overrides={TINY}"),
        *(f"--config.init={sharded}", "--config.steps=1", "--config.batch_size=32"),
        *("--config.optim.learning_rate=1e-30", "--config.optim.warmup_steps=0"),
        *("--config.optim.weight_decay=0.0", "--config.data.eval_batch_size=8"),
        *(f"--config.data.data_dir={data_dir}", "--config.log.tensorboard=false"),
    )
    run(2, "train", f"--workdir={tmp_path}", "--config.mesh.fsdp=4", *flags)
    params = [jax.tree.leaves(load(there).variables["params"]) for there in (tmp_path, sharded)]
    for ours, theirs in zip(*params, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_launcher_s_second_process_exports_nothing(sharded, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["export", str(sharded), f"{tmp_path}/x.safetensors"]) == 2
    assert "torchrun started export as 2 processes, but it runs in one" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("damaged", ["blue/000.png", "red/007.png"])
def test_an_image_that_one_process_cannot_read_ends_all_with_a_sentence(run, tmp_path, damaged):
    config = folder_run(make_folder(tmp_path / "0"))
    config.steps, config.optim.warmup_steps = 1, 0
    train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    image = tmp_path / "1" / "val" / damaged
    image.write_bytes(bytes(image.stat().st_size))
    each = [(f"--data=folder:{tmp_path}/{i}",) for i in range(2)]
    began = time.monotonic()
    printed = run(2, "eval", tmp_path / "run", "--batch_size=8", each=each, status=2)
    assert time.monotonic() - began < 110  # if only one ended, the other would wait for 120 s
    assert not any("Traceback" in error for _, error in printed)
    first, second = (error.splitlines()[-1] for _, error in printed)
    assert first.startswith("error: another process c")
    assert first.endswith("; see its error")
    assert f"1/val/{damaged}" in second

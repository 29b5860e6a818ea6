"""Tables and figures: the data, the statistics, and a small run from the start to the table."""

import errno
import io
import json
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import ROOT, TINY
from flax import linen as nn
from PIL import Image
from variables import drawn

from resnet_flax import create_model
from resnet_flax.cli import main
from resnet_flax.cli.reproduce import duration
from resnet_flax.config import load_config
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import ArraySource, open_source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.multi_view import PROTOCOLS, Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.models.scan import stack
from resnet_flax.paper import runs
from resnet_flax.paper.planning import Training, trainings
from resnet_flax.paper.responses import responses
from resnet_flax.paper.table import summary, table
from resnet_flax.paper.targets import TARGETS, Row, Target
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.divergence import diverged
from resnet_flax.weights.loading import load

SHORT = (
    *("--config.steps=12", "--config.optim.warmup_steps=4", "--config.eval.every=4"),
    *("--config.log.every=2", "--config.checkpoint.every=4", "--config.log.tensorboard=false"),
    *(f"--config.model.overrides={TINY}", "--config.data.eval_batch_size=120"),
)


def test_every_row_has_a_config_and_the_paper_s_figures():
    # The paper's tables 2 to 6.
    expected = {
        "table2": """
            plain-18 27.94; plain-34 28.54; ResNet-18 A 27.88; ResNet-34 A 25.03""",
        "table3": """
            VGG-16 28.07 9.33; plain-34 28.54 10.02; ResNet-34 A 25.03 7.76;
            ResNet-34 B 24.52 7.46; ResNet-34 C 24.19 7.40; ResNet-50 22.85 6.71;
            ResNet-101 21.75 6.05; ResNet-152 21.43 5.71""",
        "table4": """
            ResNet-34 B 21.84 5.71; ResNet-34 C 21.53 5.60; ResNet-50 20.74 5.25;
            ResNet-101 19.87 4.60; ResNet-152 19.38 4.49""",
        "table5": "ResNet (ILSVRC'15) 3.57",
        "table6": """
            ResNet-20 8.75; ResNet-32 7.51; ResNet-44 7.17; ResNet-56 6.97; ResNet-110 6.61;
            ResNet-1202 7.93""",
    }
    for name, target in TARGETS.items():
        assert target.protocol in PROTOCOLS
        rows = {row.name: row for row in target.rows}
        assert len(rows) == len(target.rows)
        for row in target.rows:
            assert set(row.paper) <= set(target.columns)
            for path in [row.config, *(path for path, _ in row.members)]:
                if path:
                    load_config(path)
        ours = {row.name for row in target.rows if row.config or row.members}
        listed = expected.get(name, "").split(";") if name in expected else []
        for line in listed:
            *words, figures = (
                line.split()[: -len(target.columns)],
                line.split()[-len(target.columns) :],
            )
            row = " ".join(words[0])
            assert [rows[row].paper[c] for c in target.columns] == [float(f) for f in figures]
            ours.discard(row)
        plain = {row for row in ours if row.startswith("plain")}  # which table 6 does not print
        assert name not in expected or ours == plain


def test_means_deviations_and_distances():
    found = summary([8.0, 9.0, 8.5], 8.75)
    assert found["mean"] == 8.5
    assert found["std"] == pytest.approx(0.5)
    assert found["difference"] == pytest.approx(-0.25)
    assert found["inside"]
    assert not summary([8.0, 8.1, 8.2], 8.75)["inside"]
    one = summary([8.0], 8.75)
    assert one["std"] is None
    assert one["inside"] is None  # one run has no spread
    assert summary([8.0, 9.0], None)["difference"] is None


def test_a_target_is_trained_evaluated_and_shown(data_dir, tmp_path, capsys, monkeypatch):
    out, figure = tmp_path / "out.json", tmp_path / "figure.png"
    command = [
        *("reproduce", "run", "degradation_digits", "--seeds=2", "--only=plain-20,ResNet-20"),
        *(f"--workdir={tmp_path / 'runs'}", f"--out={out}", f"--figure={figure}"),
        *(f"--data_dir={data_dir}", *SHORT),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "4 training runs, 0 finished; what is left takes" in printed
    assert "CHANGED: steps=12, optim.warmup_steps=4, eval" in " ".join(printed.split())
    found = json.loads(out.read_text())
    assert [(run["row"], run["seed"]) for run in found] == [
        *(("plain-20", 0), ("ResNet-20", 0), ("plain-20", 1), ("ResNet-20", 1))
    ]
    for run in found:
        assert [step for step, _ in run["curve"]["test"]] == [4, 8, 12]
        assert run["curve"]["test"][-1][1] == round(run["error"]["top-1"], 2)
        assert run["config"]["steps"] == 12
        assert "data.data_dir" not in run["config"]
        assert {"commit", "device", "versions"} <= set(run)
    with Image.open(figure) as drawn:
        assert drawn.size == (1350, 570)
    mean = np.mean([run["error"]["top-1"] for run in found if run["row"] == "ResNet-20"])
    assert f"{mean:.2f} ± " in printed

    # Again: nothing is trained, and only what was removed is computed.
    def refuse(*_):
        raise AssertionError("trained again")

    trained = runs.run_experiment
    monkeypatch.setattr(runs, "run_experiment", refuse)
    assert main(command) == 0
    assert "4 training runs, all finished" in capsys.readouterr().out
    (gone,) = (tmp_path / "runs").glob("*resnet20-cifar_resnet20-*/seed1")
    shutil.rmtree(gone)
    calls = []
    monkeypatch.setattr(
        runs, "run_experiment", lambda *args: (calls.append(args[1]), trained(*args))
    )
    assert main(command) == 0
    assert calls == [gone]
    assert len(json.loads(out.read_text())) == 4

    capsys.readouterr()
    assert main(["reproduce", "show", "degradation_digits", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "plain-56              top-1       -  not run" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def _settings(data_dir, *more):
    return [f.removeprefix("--config.") for f in (*SHORT, *more)] + [f"data.data_dir={data_dir}"]


def _run(target, planned, out):
    with SignalHandler() as stop:
        runs.run(target, planned, out, stop, say=lambda line: None)
    return json.loads(out.read_text())


def _networks(planned, preprocessing):
    opened = [load(one.workdir) for one in planned]
    return [Network(found.model, found.variables, preprocessing(found)) for found in opened]


@pytest.mark.long
def test_a_seed_that_diverges_is_named_and_the_others_are_trained(
    data_dir, tmp_path, capsys, monkeypatch
):
    train, trained = runs.run_experiment, []

    def diverging(config, workdir, stop):
        trained.append(config.seed)
        if config.seed == 0:
            raise diverged(6, "loss nan", "start again")
        return train(config, workdir, stop)

    monkeypatch.setattr(runs, "run_experiment", diverging)
    out = tmp_path / "out.json"
    command = [
        *("reproduce", "run", "degradation_digits", "--seeds=2", "--only=plain-20"),
        *(f"--workdir={tmp_path / 'runs'}", f"--out={out}", f"--data_dir={data_dir}", *SHORT),
    ]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert trained == [0, 1]
    assert "warning: plain-20, seed 0: training diverged at step 6 (loss nan)" in shown.out
    assert shown.err == (
        "error: training diverged for plain-20, seed 0; see above for the step and the remedy\n"
    )
    assert [run["seed"] for run in json.loads(out.read_text())] == [1]


def test_that_all_seeds_diverge_is_said_though_there_is_nothing_to_draw(
    data_dir, tmp_path, capsys, monkeypatch
):
    def diverging(*_):
        raise diverged(6, "loss nan", "start again")

    monkeypatch.setattr(runs, "run_experiment", diverging)
    files = (f"--out={tmp_path}/x.json", f"--figure={tmp_path}/x.png")
    command = [
        *("reproduce", "run", "degradation_digits", "--only=plain-20", f"--data_dir={data_dir}"),
        *(f"--workdir={tmp_path / 'runs'}", *files, *SHORT),
    ]
    assert main(command) == 2
    assert "error: training diverged for plain-20, seed 0; see" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("[]")
    assert main(["reproduce", "show", "degradation_digits", *files]) == 2
    assert "error: there is nothing to draw in " in capsys.readouterr().err


def test_the_results_file_is_tried_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file")
    assert main(["reproduce", "run", "degradation_digits", "--dry_run"]) == 2
    assert "error: --out, by default results/degradation_digits.json, must be a file that can" in (
        capsys.readouterr().err
    )


@pytest.mark.long
def test_what_is_evaluated_under_a_protocol_is_kept_until_trained_anew(
    data_dir, tmp_path, monkeypatch
):
    """Several scales of digits, as table 4 uses for ImageNet."""
    row = TARGETS["degradation_digits"].rows[2]
    target = Target("scales of digits", (row,), ("top-1", "top-5"), "multiscale")
    planned = trainings(target, [0], tmp_path / "runs", _settings(data_dir))
    out = tmp_path / "out.json"
    first = _run(target, planned, out)
    networks = _networks(planned, lambda found: found.preprocessing)
    source = open_source("tfds:digits", "test", data_dir)
    result = evaluate_pretrained(networks, source, protocol="multiscale", batch_size=100)
    assert first[0]["error"]["top-1"] == round(100 * result.error, 4)
    assert first[0]["error"]["top-5"] == round(100 * result.top5_error, 4)
    center = [planned[0].result["errors"] / planned[0].result["count"]]
    center.append(planned[0].result["top5_error"])  # one of the two may agree by chance
    assert list(first[0]["error"].values()) != [round(100 * error, 4) for error in center]

    evaluated = runs.evaluate_pretrained
    monkeypatch.setattr(runs, "evaluate_pretrained", None)  # calling it would fail
    assert _run(target, planned, out) == first
    monkeypatch.setattr(runs, "evaluate_pretrained", evaluated)
    for path in planned[0].workdir.iterdir():
        if path.name != "multiscale.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = trainings(
        target, [0], tmp_path / "runs", _settings(data_dir, "--config.optim.learning_rate=0.001")
    )
    (again,) = _run(target, [other[0]._replace(workdir=planned[0].workdir)], out)
    assert again["error"] != first[0]["error"]


@pytest.mark.parametrize("split", ["holdout", "test"])
def test_a_network_is_evaluated_on_its_own_order_of_classes(monkeypatch, tmp_path, split):
    source = ArraySource(np.zeros((2, 2, 2, 1), np.uint8), [0, 1], ("2", "10"))
    monkeypatch.setattr(runs, "open_splits", lambda data: (None, source))
    monkeypatch.setattr(runs, "open_source", lambda *where: source)
    config = load_config(str(ROOT / "configs" / "digits_resnet20.py"))
    config.data.eval_split = split
    found = SimpleNamespace(class_names=("10", "2"), model=SimpleNamespace(num_classes=2))
    one = Training("row", config, tmp_path)
    assert [int(runs._test_set(one, found)[i]["label"]) for i in range(2)] == [1, 0]


@pytest.mark.long
def test_an_ensemble_has_its_members_trained_and_averaged(data_dir, tmp_path, monkeypatch):
    given = []

    def recorded(networks, *arguments, **settings):
        given.extend(networks)
        return evaluate_pretrained(networks, *arguments, **settings)

    monkeypatch.setattr(runs, "evaluate_pretrained", recorded)
    row = Row(
        "both",
        members=(("configs/digits_resnet20.py", 0), ("configs/digits_resnet20.py", 1)),
    )
    target = Target("two seeds", (row,), ("top-1",), "center")
    planned = trainings(target, [0, 1, 2], tmp_path / "runs", _settings(data_dir))
    assert [one.config.seed for one in planned] == [0, 1]
    (record,) = _run(target, planned, tmp_path / "out.json")
    networks = _networks(planned, lambda found: found.preprocessing)
    source = open_source("tfds:digits", "test", data_dir)
    result = evaluate_pretrained(networks, source, batch_size=100)
    assert record["error"]["top-1"] == round(100 * result.error, 4)
    # Comparing errors is not enough: an ensemble may err as often as a member.
    expected, found = (
        [jax.tree.leaves(network.variables)[0] for network in several]
        for several in (networks, given)
    )
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(found, expected)
    assert [member["seed"] for member in record["members"]] == [0, 1]
    assert {"commit", "device", "versions"} == set(record["evaluated"])


def test_a_rehearsal_is_no_part_of_the_real_thing(data_dir, tmp_path):
    row = TARGETS["degradation_digits"].rows[2]
    target = Target("digits", (row,))
    real = trainings(target, [0], tmp_path, [f"data.data_dir={data_dir}"])
    assert real == trainings(target, [0], tmp_path, [f"data.data_dir={data_dir}"])
    short = trainings(target, [0], tmp_path, _settings(data_dir))
    assert real[0].workdir != short[0].workdir
    how = ["mesh.data=1", "log.every=5", "data.workers=2", "checkpoint.every=9"]
    assert trainings(target, [0], tmp_path, how)[0].workdir == real[0].workdir
    other = trainings(target, [0], tmp_path, _settings("elsewhere"))
    assert other[0].workdir == short[0].workdir

    about = {"seed": 0, "protocol": "center", "device": "d", "versions": {"jax": "1", "flax": "2"}}
    about |= {"row": row.name, "experiment": row.config, "commit": "c" * 40}
    found = [
        {**about, "changed": ["steps=8"], "error": {"top-1": 90.0}},
        {**about, "changed": [], "error": {"top-1": 10.0}},
    ]
    text = table(target, found)
    assert "10.00 (1)" in text
    assert "90.00 (1)" in text
    assert text.index("10.00") < text.index("CHANGED: steps=8") < text.index("90.00")
    assert table(TARGETS["degradation_cifar10"], found).count("not run") == 4  # other networks


def test_relative_directories_and_a_torn_save_do_no_harm(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("torn/digits_resnet20-cifar_plain20/seed0/checkpoints/8.orbax-checkpoint-tmp").mkdir(
        parents=True
    )
    command = [
        *("reproduce", "run", "figure7_digits", "--only=plain-20", "--out=o.json"),
        *(f"--data_dir={data_dir}", *SHORT),
    ]
    assert main([*command, "--workdir=torn", "--dry_run"]) == 0
    assert main([*command, "--workdir=runs"]) == 0
    (run,) = json.loads(Path("o.json").read_text())
    assert len(run["responses"]) == 5
    assert [path.name for path in Path("runs").iterdir()] != ["digits_resnet20-cifar_plain20"]
    capsys.readouterr()
    Path("text.json").write_text("notes of mine")
    assert main([*command, "--workdir=runs", "--out=text.json"]) == 2
    assert "text.json is not a results file of reproduce" in capsys.readouterr().err
    assert Path("text.json").read_text() == "notes of mine"


def test_a_time_limit_stops_as_a_signal_does(data_dir, tmp_path, capsys):
    command = [
        *("reproduce", "run", "degradation_digits", "--only=ResNet-20", "--minutes=0.1"),
        *(f"--workdir={tmp_path}", f"--out={tmp_path / 'o.json'}", f"--data_dir={data_dir}"),
    ]
    start = time.monotonic()
    assert main(command) == 143
    assert time.monotonic() - start < 120
    # On a slow machine it comes before the first step.
    assert re.search(r"run the same command again to (continue|begin)", capsys.readouterr().err)
    assert not (tmp_path / "o.json").exists()


def test_a_terminal_that_cannot_be_written_ends_no_training(data_dir, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    called = []
    monkeypatch.setattr(runs, "run", lambda *_, **__: called.append(1))
    monkeypatch.setattr(sys, "stdout", Full())
    out = tmp_path / "o.json"
    command = ["reproduce", "run", "degradation_digits", "--only=ResNet-20", f"--out={out}"]
    assert main([*command, f"--workdir={tmp_path}", f"--data_dir={data_dir}"]) == 0
    assert called == [1]


def test_costs_are_said_before_anything_is_trained(data_dir, tmp_path, capsys):
    dry = ["reproduce", "run", "table6", f"--workdir={tmp_path}", "--dry_run", "--tflops=30"]
    data = ["--config.data.source=tfds:digits", f"--data_dir={data_dir}"]
    assert main([*dry, *data, "--only=ResNet-20"]) == 0
    # 6 x 40.5 million multiply-adds x 128 images x 64,000 steps, at 8 x 8 / 8 x 8 of 32 x 32.
    assert "1 training run, 0 finished; what is left takes 1.99 PFLOP, 66 s at 30 TFLOP/s" in (
        capsys.readouterr().out
    )
    assert main([*dry, f"--data_dir={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert "\nmissing data: tfds:cifar10 is not prepared in" in out
    assert err == ""
    assert main([*dry[:-2], f"--data_dir={tmp_path}"]) == 2
    assert "cifar10 is not prepared" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_responses_are_of_3x3_layers_behind_their_normalisation():
    rng = np.random.default_rng(0)
    source = ArraySource(
        rng.integers(0, 256, (7, 8, 8, 3), np.uint8), rng.integers(0, 10, 7), tuple("0123456789")
    )
    model = create_model("cifar_resnet20", stage_sizes=(1, 2, 1))
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    scales = iter(np.linspace(0.5, 2, 9))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * next(scales) if path[-1].key == "scale" else leaf, variables
    )
    network = Network(model, variables, Preprocessing(0))
    found = responses(network, source, batch_size=4)
    assert len(found) == 9
    scanned = Network(model.clone(scan=True), stack(variables), Preprocessing(0))
    np.testing.assert_allclose(responses(scanned, source, batch_size=4), found, rtol=1e-5)
    groups = create_model("cifar_resnet8", norm="group")
    with pytest.raises(UserError, match="layer responses need batch normalisation"):
        responses(Network(groups, variables, Preprocessing(0)), source)

    outputs = []

    def note(call, arguments, keywords, context):
        output = call(*arguments, **keywords)
        norm = type(context.module).__name__ == "BatchNorm"
        if norm and context.method_name == "__call__":
            outputs.append(np.asarray(output, np.float64))
        return output

    with nn.intercept_methods(note):
        x = network.preprocessing.normalize(jnp.asarray(source.images))
        partial(model.apply, variables, x, train=False)()
    np.testing.assert_allclose(found, [y.std() for y in outputs], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "resnet-flax reproduce needs an action: list, run or show"),
        (["do"], "there is no action 'do'"),
        (["show", "table9"], "there is no target 'table9'; did you mean table6"),
        (["run", "table6", "--seeds=0"], "--seeds must be a whole number from 1 to 1000, not '0'"),
        (["run", "table6", "--only=ResNet-21"], "there is no row 'ResNet-21'; did you mean"),
        (
            ["run", "table2", "--only=ResNet-21"],
            "? (known: plain-18, plain-34, ResNet-18 A, ResNet-34 A)",
        ),
        (["run", "table6", "--steps=3"], "there is no flag '--steps=3'; did you mean --config.st"),
        (["run", "table6", "--out=x.txt"], "--out must be a file that ends in .json"),
        (["run", "table6", "--config.stepz=3"], "there is no config key 'stepz'"),
        (["run", "table6", "--minutes=-1"], "--minutes must be a number from 0 to 1000000, not"),
        (["run", "table6", "--minutes=inf"], "--minutes must be a number from 0"),
        (["run", "table6", "--seeds=3000000000"], "--seeds must be a whole number from 1 to"),
        (["run", "table6", "--config.seed=3"], "pass --seeds instead of --config.seed"),
        (["run", "table6", "--config.data.data_dir=x"], "pass --data_dir instead of"),
        (["run", "table6", "--figure=f.xyz"], "--figure must be a file that ends in .png"),
        (["show", "table6", "--out=none.json"], "there is no file of results none.json"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_results_nothing_is_drawn(capsys, tmp_path):
    (tmp_path / "r.json").write_text("[]")
    files = [f"--out={tmp_path / 'r.json'}", f"--figure={tmp_path / 'f.png'}"]
    assert main(["reproduce", "show", "table6", *files]) == 2
    assert f"nothing to draw in {tmp_path / 'r.json'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.56, "2.6 s"),
        (0.0123, "0.012 s"),
        (65.0, "65 s"),
        (1080.0, "18 min"),
        (5400.0, "1.5 h"),
        (3.3e6, "38 days"),
        (9e8, "10,417 days"),
    ],
)
def test_durations_have_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_targets_are_listed_in_80_columns(capsys):
    assert main(["reproduce", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TARGETS)
    assert max(map(len, lines)) <= 80
    assert sum("(not in the paper)" in line for line in lines) == 2
    for target in TARGETS.values():
        assert max(map(len, table(target, []).splitlines())) <= 80


def test_facts_stand_in_the_table_and_what_was_not_run_says_so():
    text = table(TARGETS["table4"], [])
    assert "VGG (v5)              top-1   24.40" in text
    assert "ResNet-50             top-1   20.74  not run" in text


@pytest.mark.long
def test_published_weights_have_responses_and_their_errors(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FLAX_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    here = tmp_path / "weights" / "cifar_resnet20.akamaster_cifar10.th"
    shutil.copy(shared_data / "weights/resnet20-12fca82f.th", here)
    out, figure = tmp_path / "out.json", tmp_path / "f.png"
    flags = [f"--data_dir={shared_data / 'tfds'}", f"--out={out}", f"--figure={figure}"]
    assert main(["reproduce", "run", "figure7_published", "--only=ResNet-20", *flags]) == 0
    (run,) = json.loads(out.read_text())
    assert run["error"]["top-1"] == 8.27
    assert len(run["responses"]) == 19
    assert all(0 < std < 10 for std in run["responses"])
    assert figure.stat().st_size > 10_000

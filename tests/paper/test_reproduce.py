"""Tables and figures: the data, the sums, and a small run from the start to the table."""

import json
import shutil
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from resnet_flax import create_model
from resnet_flax.cli import main
from resnet_flax.config import load_config
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import ArraySource
from resnet_flax.evaluation.protocols import PROTOCOLS, Network
from resnet_flax.paper import runs
from resnet_flax.paper.responses import responses
from resnet_flax.paper.table import summary, table
from resnet_flax.paper.targets import TARGETS

SHORT = (
    *("--config.steps=12", "--config.optim.warmup_steps=4", "--config.eval.every=4"),
    *("--config.log.every=2", "--config.checkpoint.every=4", "--config.log.tensorboard=false"),
    "--config.model.axes=stage_sizes=(1,1,1)",
)


def test_every_row_has_a_config_and_the_paper_s_figures():
    # ../shared/reference/numbers.md, from the paper's tables.
    expected = {
        "table2": {"plain-34": (28.54,), "ResNet-18 A": (27.88,), "ResNet-34 A": (25.03,)},
        "table3": {"ResNet-34 B": (24.52, 7.46), "ResNet-50": (22.85, 6.71)},
        "table4": {"ResNet-50": (20.74, 5.25), "ResNet-152": (19.38, 4.49)},
        "table5": {"ResNet (ILSVRC'15)": (3.57,)},
        "table6": {"ResNet-20": (8.75,), "ResNet-110": (6.61,), "ResNet-1202": (7.93,)},
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
        for row, figures in expected.get(name, {}).items():
            assert tuple(rows[row].paper[column] for column in target.columns) == figures


def test_means_deviations_and_distances():
    found = summary([8.0, 9.0, 8.5], 8.75)
    assert found["mean"] == 8.5
    assert found["std"] == pytest.approx(0.5)
    assert found["difference"] == pytest.approx(-0.25)
    assert found["inside"]
    assert not summary([8.0, 8.1, 8.2], 8.75)["inside"]
    one = summary([8.0], 8.75)
    assert one["std"] is None
    assert one["inside"] is None  # one run says nothing of its spread
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
    assert "4 trainings, 0 finished; what is left takes" in printed
    assert "NOT THE PAPER'S: steps=12" in " ".join(printed.split())
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

    # Again: nothing is trained, and what was taken away is all that is.
    def refuse(*_):
        raise AssertionError("trained again")

    trained = runs.train_network
    monkeypatch.setattr(runs, "train_network", refuse)
    assert main(command) == 0
    assert "4 trainings, all finished" in capsys.readouterr().out
    (gone,) = (tmp_path / "runs").glob("*resnet20-cifar_resnet20/seed1")
    shutil.rmtree(gone)
    calls = []
    monkeypatch.setattr(
        runs, "train_network", lambda *args: (calls.append(args[1]), trained(*args))
    )
    assert main(command) == 0
    assert calls == [gone]
    assert len(json.loads(out.read_text())) == 4

    capsys.readouterr()
    assert main(["reproduce", "show", "degradation_digits", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "plain-56              top-1       -  not run" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_what_is_evaluated_under_a_protocol_is_kept(data_dir, tmp_path, monkeypatch):
    """Ten crops of digits, as tables 2 and 3 take them of ImageNet."""
    (plain, residual), title = TARGETS["degradation_digits"].rows[::2], "ten crops of digits"
    target = runs.Target(title, (plain, residual), ("top-1", "top-5"), "multiscale")
    settings = [flag.removeprefix("--config.") for flag in SHORT] + [f"data.data_dir={data_dir}"]
    planned = runs.trainings(target, [0], tmp_path / "runs", settings)
    out = tmp_path / "out.json"
    with runs.Interruption() as stop:
        runs.run(target, planned, out, stop, say=lambda line: None)
        first = json.loads(out.read_text())
        evaluated = runs.evaluate_pretrained
        monkeypatch.setattr(runs, "evaluate_pretrained", None)  # calling it would fail
        runs.run(target, planned, out, stop, say=lambda line: None)
        assert json.loads(out.read_text()) == first
        (path,) = planned[0].workdir.glob("multiscale.json")
        path.unlink()
        monkeypatch.setattr(runs, "evaluate_pretrained", evaluated)
        runs.run(target, planned, out, stop, say=lambda line: None)
    assert {tuple(run["error"]) for run in first} == {("top-1", "top-5")}
    assert [run["error"] for run in json.loads(out.read_text())] == [r["error"] for r in first]


def test_an_ensemble_has_its_members_trained_and_averaged(data_dir, tmp_path):
    row = runs.Row(
        "both",
        members=(("configs/digits_resnet20.py", 0), ("configs/digits_resnet20.py", 1)),
    )
    target = runs.Target("two seeds", (row,), ("top-1",), "center")
    settings = [flag.removeprefix("--config.") for flag in SHORT] + [f"data.data_dir={data_dir}"]
    planned = runs.trainings(target, [0, 1, 2], tmp_path / "runs", settings)
    assert [one.config.seed for one in planned] == [0, 1]
    with runs.Interruption() as stop:
        runs.run(target, planned, tmp_path / "out.json", stop, say=lambda line: None)
    (record,) = json.loads((tmp_path / "out.json").read_text())
    members = [100 * one.result["errors"] / one.result["count"] for one in planned]
    assert len({record["error"]["top-1"], *members}) > 1


def test_a_time_limit_stops_as_a_signal_does(data_dir, tmp_path, capsys):
    command = [
        *("reproduce", "run", "degradation_digits", "--only=ResNet-56", "--minutes=0.15"),
        *(f"--workdir={tmp_path}", f"--out={tmp_path / 'o.json'}", f"--data_dir={data_dir}"),
    ]
    start = time.monotonic()
    assert main(command) == 143
    assert time.monotonic() - start < 120
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_costs_are_said_before_anything_is_trained(data_dir, tmp_path, capsys):
    dry = ["reproduce", "run", "table6", f"--workdir={tmp_path}", "--dry_run", "--tflops=30"]
    data = ["--config.data.source=tfds:digits", f"--data_dir={data_dir}"]
    assert main([*dry, *data, "--only=ResNet-20"]) == 0
    # 6 x 40.5 million multiply-adds x 128 images x 64,000 steps, at 8 x 8 / 8 x 8 of 32 x 32.
    assert "1 trainings, 0 finished; what is left takes 1.99 PFLOP, 0.018 hours" in (
        capsys.readouterr().out
    )
    assert main([*dry, f"--data_dir={tmp_path}"]) == 2
    assert "cifar10" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_responses_are_of_3x3_layers_behind_their_normalisation():
    rng = np.random.default_rng(0)
    source = ArraySource(
        rng.integers(0, 256, (7, 8, 8, 3), np.uint8), rng.integers(0, 10, 7), tuple("0123456789")
    )
    model = create_model("cifar_resnet8")
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    scales = iter(np.linspace(0.5, 2, 7))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * next(scales) if path[-1].key == "scale" else leaf, variables
    )
    network = Network(model, variables, Preprocessing(0))
    found = responses(network, source, batch_size=4)
    assert len(found) == 7

    outputs = []

    def note(call, arguments, keywords, context):
        output = call(*arguments, **keywords)
        if type(context.module).__name__ == "BatchNorm":
            outputs.append(np.asarray(output, np.float64))
        return output

    with nn.intercept_methods(note):
        x = network.preprocessing.normalize(jnp.asarray(source.images))
        partial(model.apply, variables, x, train=False)()
    np.testing.assert_allclose(found, [y.std() for y in outputs], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do: resnet-flax reproduce list, run TARGET or show TARGET"),
        (["do"], "say what to do"),
        (["show", "table9"], "there is no target 'table9'; did you mean table6"),
        (["run", "table6", "--seeds=0"], "--seeds takes a number from 1, not 0"),
        (["run", "table6", "--only=ResNet-21"], "there is no row 'ResNet-21'; did you mean"),
        (["run", "table6", "--steps=3"], "there is no flag '--steps=3'"),
        (["run", "table6", "--config.stepz=3"], "there is no config key 'stepz'"),
        (["run", "table6", "--minutes=-1"], "take numbers from 0"),
        (["show", "table6", "--out=none.json", "--figure=f.png"], "nothing to draw in none.json"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


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

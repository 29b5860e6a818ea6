"""A run with data.holdout is evaluated on exactly the images that it held out."""

import json
import shutil

import pytest
from photographs import folder_run, make_folder

from resnet_flax.cli import main
from resnet_flax.cli.eval_data import open_eval_data
from resnet_flax.cli.parser import Parser
from resnet_flax.errors import UserError
from resnet_flax.sweep import sweep
from resnet_flax.weights.loading import load


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with images, runs of two seeds that hold out a fifth of them, and the result."""
    where = tmp_path_factory.mktemp("holdout")
    config = folder_run(make_folder(where / "images", train=10, val=2))
    config.data.holdout, config.data.eval_split = 0.2, "holdout"
    config.steps, config.optim.warmup_steps = 2, 1
    return where, sweep(config, [0, 1], where / "runs")


def _data(models, *flags):
    """What `eval` would evaluate on."""
    from resnet_flax.cli import eval_flags

    parser = Parser(prog="eval")
    eval_flags.add(parser)
    parser.set_defaults(run=print)
    return open_eval_data(parser.parse(["RUN", *flags]), models)


@pytest.mark.parametrize(("seed", "flags"), [(0, ()), (1, ("--split=holdout", "--batch_size=4"))])
def test_it_is_the_number_that_training_ended_with(runs, tmp_path, capsys, seed, flags):
    where, swept = runs
    workdir = where / "runs" / f"seed{seed}"
    ended = json.loads((workdir / "result.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(workdir), f"--out={tmp_path}/x.json", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "images, holdout (6 of the 30 images of train, which the run held out), center" in out
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["split"], found["count"]) == ("holdout", ended["count"])
    assert found["top1_error"]["errors"] == ended["errors"]
    assert f"{100 * found['top1_error']['rate']:.4f}" == f"{swept['error_percent'][str(seed)]:.4f}"
    assert found["negative_log_likelihood"] == pytest.approx(ended["loss"], rel=1e-6)


def test_what_is_near_a_run_names_it(runs, capsys):
    where = runs[0] / "runs"
    for wrong, right in (
        (where, f"one of the runs in it, such as {where}/seed0, {where}/seed1"),
        (where.parent, f"one of the runs in it, such as {where}/seed0, {where}/seed1"),
        (where / "seed0/checkpoints", f"{where}/seed0, which it is part of"),
        (where / "seed0/checkpoints/2/state", f"{where}/seed0/checkpoints/2, which it is part of"),
        (where / "seed0/result.json", f"{where}/seed0, which it is part of"),
        (where.parent / "images", "the workdir of a run, or a weights file"),
    ):
        capsys.readouterr()
        assert main(["eval", str(wrong)]) == 2
        assert capsys.readouterr().err.endswith(f"; give {right}\n")


def test_the_run_s_own_data_may_be_spelled_otherwise(runs, monkeypatch):
    where, _ = runs
    monkeypatch.chdir(where)
    first = load(where / "runs/seed0")
    for spelled in (f"{where}/images/", "images", f"file://{where}/images"):
        assert _data([first], f"--data=folder:{spelled}").split == "holdout"


def test_changed_images_are_noticed(runs, tmp_path):
    where, _ = runs
    first = load(where / "runs/seed0")
    moved = tmp_path / "moved"
    shutil.copytree(where / "images", moved)
    flags = (f"--data=folder:{moved}", "--split=holdout")
    assert len(_data([first], *flags).source) == 6
    (moved / "train/red/009.png").rename(moved / "train/red/999.png")
    with pytest.raises(UserError, match=r"RUN held out can no longer .* class red have other"):
        _data([first], *flags)
    # The data set's own split of that name is another thing.
    shutil.copytree(moved / "val", moved / "holdout")
    assert _data([first], *flags).about == "holdout (6 images)"


def test_changed_images_of_another_split_are_noted(runs, capsys):
    where, _ = runs
    first = load(where / "runs/seed0")
    config = {**first.config, "data.eval_split": "val"}
    assert _data([first._replace(config=config)]).split == "val"
    assert "note: these are not the images of the run's own evaluations" in capsys.readouterr().err
    assert _data([first]).split == "holdout"
    assert capsys.readouterr().err == ""


def test_without_a_holdout_there_is_a_sentence(runs):
    where, _ = runs
    first = load(where / "runs/seed0")
    without = first._replace(config={**first.config, "data.holdout": 0.0})
    with pytest.raises(UserError, match=r"RUN was trained without data.holdout, so that --split=h"):
        _data([without], "--split=holdout")
    with pytest.raises(UserError, match=r"RUN is not the workdir of a run, so that --split=holdou"):
        _data([first._replace(config={})], f"--data=folder:{where}/images", "--split=holdout")


def test_an_ensemble_has_not_seen_the_images_either(runs, capsys):
    models = [load(runs[0] / f"runs/seed{seed}") for seed in (0, 1)]
    assert len(_data(models).source) == 6
    models[1] = models[1]._replace(config={**models[1].config, "data.holdout": 0.1})
    with pytest.raises(UserError, match=r"seed1 has data.holdout=0.1, so that it was trained on"):
        _data(models)
    assert len(_data(models[::-1]).source) == 3  # of which the other one held out all
    models[1] = models[1]._replace(fingerprints={})
    assert len(_data(models).source) == 6
    assert "seed1 does not record whether it was trained on these" in capsys.readouterr().err


def test_other_names_of_outputs_leave_the_run_s_own_data_as_they_are(runs, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("azure\nred\ngreen\n")
    workdir = runs[0] / "runs/seed0"
    assert main(["eval", str(workdir), f"--class_names={tmp_path}/names.txt"]) == 2
    assert "1 of the data's 3 classes are not among" in capsys.readouterr().err

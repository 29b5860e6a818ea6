"""Old names are read: in configs, networks, calls, and a complete run."""

import json
import shutil
import tarfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.cli import main
from resnet_flax.config import conflicts, default_config, load_config, override, resolve
from resnet_flax.errors import UserError
from resnet_flax.renamed import RenamedWarning, saved_config
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.loop import train
from resnet_flax.training.writers import read_metrics
from resnet_flax.weights.loading import load

GOLDENS = Path(__file__).parent / "goldens"


def test_old_config_keys_are_read_with_a_sentence_that_names_the_new():
    config = default_config()
    with pytest.warns(RenamedWarning, match="key data.colour is called data.pca_lighting now"):
        override(config, ["data.colour=0.1"])
    config.model.norm_span = "32"  # as a config file has it
    config.model.axes = "squeeze=16 stem=deep shortcut_pool=True"
    with pytest.warns(RenamedWarning) as said:
        found = resolve(config)
    sentences = "; ".join(str(warning.message) for warning in said)
    assert "config key model.norm_span is called model.bn_group_size now; use that" in sentences
    assert "squeeze is called se_ratio now" in sentences
    assert "shortcut_pool is called avg_down now" in sentences
    assert found.data.pca_lighting == 0.1
    assert found.model.bn_group_size == "32"
    assert found.model.axes == "se_ratio=16 stem=deep avg_down=True"
    with warnings.catch_warnings(action="error"):
        assert resolve(found) == found


def test_an_old_and_a_new_key_that_differ_are_refused():
    both = {"model.norm_span": "8", "model.bn_group_size": "16"}
    with (
        pytest.warns(RenamedWarning),
        pytest.raises(UserError, match=r"norm_span and model\.bn_group_size are the same; give"),
    ):
        resolve(both)


def test_what_was_saved_before_is_read_without_a_word():
    config = resolve({"model.bn_group_size": "32", "model.axes": "se_ratio=16"})
    saved = {"model.norm_span": "32", "model.axes": "squeeze=16"}
    assert conflicts(config, saved) == {}
    assert conflicts(config, {**saved, "model.norm_span": "8"}) == {
        "model.bn_group_size": ("8", "32")
    }
    assert resolve(saved_config(saved)) == config


def test_old_attributes_and_arguments_of_networks_are_read():
    with pytest.warns(RenamedWarning, match="attribute of networks squeeze is called se_ratio"):
        model = create_model("cifar_resnet8", squeeze=4, stem_features=4, stage_features=(4, 4, 4))
    assert model.se_ratio == 4
    x = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    with pytest.warns(RenamedWarning, match="argument features is called return_features now"):
        maps = model.apply(variables, x, train=False, features=True)
    np.testing.assert_array_equal(maps["logits"], model.apply(variables, x, train=False))
    with (
        pytest.warns(RenamedWarning),
        pytest.raises(UserError, match="features and return_features are the same argument"),
    ):
        model.apply(variables, x, train=False, features=True, return_features=True)


def test_the_command_line_notes_an_old_name_in_one_line(capsys):
    keys = ("--config.model.norm_span=8", "--config.model.axes=squeeze=16")
    assert main(["train", *keys, "--print_config"]) == 0
    out, error = capsys.readouterr()
    assert error.splitlines() == [
        "note: the config key model.norm_span is called model.bn_group_size now; use that",
        "note: the attribute of networks squeeze is called se_ratio now; use that",
    ]
    assert "model.bn_group_size = '8'" in out
    assert "model.axes = 'se_ratio=16'" in out


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run of commit a71deba, before anything was renamed, after 4 of 8 steps.

    Made there by train.py with configs/digits_resnet20.py, model.norm_span=8, 'squeeze=2' in
    model.axes and the settings below; after.jsonl has its records after all 8 steps.
    """
    with tarfile.open(GOLDENS / "before_renaming.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_of_before_is_verified_continued_and_opened(workdir, data_dir, capsys):
    config = load_config("configs/digits_resnet20.py")
    config.model.name, config.model.scan = "cifar_resnet8", True
    config.model.axes = "stage_sizes=1,2 stage_features=4,8 stem_features=4 se_ratio=2"
    config.model.bn_group_size = "8"
    config.batch_size, config.steps = 16, 8
    config.optim.schedule, config.optim.warmup_steps = "constant", 2
    config.optim.learning_rate = 0.05
    config.log.every, config.log.tensorboard = 2, False
    config.data.data_dir = data_dir
    shutil.copytree(workdir, workdir / "copy")
    train(config, workdir / "copy")
    assert "continues at step 4 of 8" in capsys.readouterr().out
    expected = {(r["split"], r["step"]): r for r in read_metrics(workdir / "after.jsonl")}
    records = {(r["split"], r["step"]): r for r in read_metrics(workdir / "copy" / "metrics.jsonl")}
    for at in (("train", 6), ("train", 8), ("test", 8)):
        # Other processors round differently; on the original one all digits were the same.
        for name in ("loss", "error", "grad_norm", "param_norm"):
            if name in expected[at]:
                assert records[at][name] == pytest.approx(expected[at][name], rel=1e-5), (at, name)
    meta = read_meta(workdir / "copy" / "checkpoints" / "8")
    assert meta["config"]["model.bn_group_size"] == "8"
    sessions = json.loads((workdir / "copy" / "result.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 4]
    opened = load(str(workdir))
    assert (opened.model.se_ratio, opened.config["model.bn_group_size"]) == (2, "8")

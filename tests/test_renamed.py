"""Old names are read: in configs, networks, calls, and a complete run."""

import hashlib
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
from resnet_flax.apply.experiment import train
from resnet_flax.apply.tables import check, default_config, override
from resnet_flax.cli import main
from resnet_flax.config import conflicts, load_config
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.models import scan
from resnet_flax.paper.planning import changes, trainings
from resnet_flax.paper.targets import find
from resnet_flax.renamed import RenamedWarning, saved_config
from resnet_flax.schema import SCHEMA
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.writers import read_metrics
from resnet_flax.weights import catalog
from resnet_flax.weights.loading import load

GOLDENS = Path(__file__).parent / "goldens"


def test_old_config_keys_are_read_with_a_sentence_that_names_the_new():
    config = default_config()
    with pytest.warns(RenamedWarning, match="key data.colour is called data.pca_lighting now"):
        override(config, ["data.colour=0.1"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config.model.norm_span = "32"  # as a config file has it
        config.model.axes = "squeeze=16 stem=deep shortcut=B shortcut_pool=True"
        found = check(config)
        assert config.model.norm_span == "32"
    assert all(warning.filename == __file__ for warning in said)
    sentences = "; ".join(str(warning.message) for warning in said)
    assert "config key model.norm_span is called model.bn_group_size now; use that" in sentences
    assert "squeeze is called se_ratio now" in sentences
    assert "shortcut_pool is called avg_down now" in sentences
    assert found.data.pca_lighting == 0.1
    assert found.model.bn_group_size == "32"
    assert found.model.overrides == "se_ratio=16 stem=deep shortcut=B avg_down=True"
    with warnings.catch_warnings(action="error"):
        assert check(found) == found


def test_an_old_and_a_new_key_that_differ_are_refused():
    same = {"model.norm_span": "8", "model.bn_group_size": "8"}
    with pytest.warns(RenamedWarning):
        assert check(same).model.bn_group_size == "8"
    both = {"model.norm_span": "8", "model.bn_group_size": "16"}
    with (
        pytest.warns(RenamedWarning),
        pytest.raises(
            UserError, match=r"norm_span and model\.bn_group_size are the same config key; give"
        ),
    ):
        check(both)


OLD_FILE = """
import ml_collections
from resnet_flax.config import default_config, load_config

def get_config(kind="default"):
    if kind == "default":
        config = default_config()
    elif kind == "bare":
        config = ml_collections.ConfigDict({"data": {}, "model": {}})
    else:
        config = load_config("configs/imagenet_paper.py:resnet50_v1")
    config.data.colour = 0.2
    config.model.norm_span = "64"
    return config
"""


@pytest.mark.filterwarnings("ignore::resnet_flax.renamed.RenamedWarning")
@pytest.mark.parametrize("kind", ["default", "bare", "derived"])
def test_the_last_value_counts_under_whichever_name(tmp_path, kind):
    (tmp_path / "old.py").write_text(OLD_FILE)

    def found(*settings):
        config = load_config(f"{tmp_path / 'old.py'}:{kind}")
        override(config, settings)
        resolved = check(config)
        return resolved.data.pca_lighting, resolved.model.bn_group_size

    assert found() == (0.2, "64")
    # A setting that is the default too.
    assert found("data.colour=0", "model.norm_span=global") == (0.0, "global")
    assert found("data.pca_lighting=0.3", "model.bn_group_size=32") == (0.3, "32")
    assert found("data.colour=0.3", "model.norm_span=32") == (0.3, "32")


@pytest.mark.filterwarnings("ignore::resnet_flax.renamed.RenamedWarning")
def test_a_target_that_was_changed_under_old_names_is_found(tmp_path):
    target = find("degradation_digits")
    old = ["model.norm_span=8", "model.axes=squeeze_multiple=2"]
    new = ["model.bn_group_size=8", "model.overrides=se_divisor=2"]
    assert changes(old) == changes(new) == new
    assert changes(["data.timeout=600", "data.accept_changes=true"]) == []
    first = trainings(target, [0], tmp_path, new)[0].workdir
    assert trainings(target, [0], tmp_path, old)[0].workdir == first
    name = first.parent.name.rpartition("-")[0]
    # The directory that the version before made of these settings.
    digest = hashlib.sha256("\n".join(old).encode()).hexdigest()[:8]
    before = tmp_path / f"{name}-{digest}" / "seed0"
    before.mkdir(parents=True)
    for settings in (old, new):
        assert trainings(target, [0], tmp_path, settings)[0].workdir == before


class OldSource:
    """A source of before: the entry `accepted` has since become `valid_labels`."""

    class_names = ("a", "b")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = np.full((8, 8, 1), index, np.uint8)
        return {"image": image, "label": np.int32(0), "accepted": np.array([True, True])}


@pytest.mark.parametrize("protocol", ["center", "multiscale"])
def test_a_source_of_before_is_counted_as_before(protocol):
    model = create_model("cifar_resnet8", num_classes=2, stem_features=4, stage_features=(4, 4, 4))
    x = jnp.zeros((1, 8, 8, 1))
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    network = Network(model, variables, Preprocessing(size=0, mean=(0.5,), std=(1.0,)))
    with pytest.warns(RenamedWarning, match="entry of an example accepted is called valid_labels"):
        result = evaluate_pretrained([network], OldSource(), protocol=protocol, batch_size=8)
    assert (result.count, result.error) == (8, 0)


def test_modules_of_before_are_found():
    with pytest.warns(RenamedWarning, match=r"models.stacking is called resnet_flax.models.scan"):
        from resnet_flax.models.stacking import unstack
    with pytest.warns(RenamedWarning, match=r"published is called resnet_flax.weights.catalog"):
        from resnet_flax.weights.published import PUBLISHED
    assert (unstack, PUBLISHED) == (scan.unstack, catalog.CATALOG)


def test_an_old_and_a_new_attribute_that_differ_are_refused():
    with (
        pytest.warns(RenamedWarning),
        pytest.raises(UserError, match="squeeze and se_ratio are the same attribute of networks"),
    ):
        create_model("cifar_resnet8", squeeze=2, se_ratio=4)


def test_what_was_saved_before_is_read_without_a_word():
    config = check({"model.bn_group_size": "32", "model.overrides": "se_ratio=16"})
    saved = {"model.norm_span": "32", "model.axes": "squeeze=16"}
    assert conflicts(config, saved, SCHEMA) == {}
    assert conflicts(config, {**saved, "model.norm_span": "8"}, SCHEMA) == {
        "model.bn_group_size": ("8", "32")
    }
    assert check(saved_config(saved)) == config


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
        model.apply(variables, x, train=False, features=True, return_features=False)


def test_the_command_line_notes_an_old_name_in_one_line(capsys):
    keys = ("--config.model.norm_span=8", "--config.model.axes=squeeze=16")
    assert main(["train", *keys, "--print_config"]) == 0
    out, error = capsys.readouterr()
    assert error.splitlines() == [
        "note: the config key model.norm_span is called model.bn_group_size now; use that",
        "note: the config key model.axes is called model.overrides now; use that",
        "note: the attribute of networks squeeze is called se_ratio now; use that",
    ]
    assert "model.bn_group_size = '8'" in out
    assert "model.overrides = 'se_ratio=16'" in out


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
    config.model.overrides = "stage_sizes=1,2 stage_features=4,8 stem_features=4 se_ratio=2"
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

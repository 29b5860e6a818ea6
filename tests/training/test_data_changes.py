"""A run continues with the data that it started with, or reports what changed."""

import json
import shutil

import pytest
from experiments import short_run
from photographs import folder_run, make_folder

from resnet_flax.apply.experiment import train
from resnet_flax.data.sources import TfdsSource
from resnet_flax.errors import UserError
from resnet_flax.training import checkpoint
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.checkpoint_files import read_meta


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of images and a finished run on it."""
    directory = tmp_path_factory.mktemp("finished")
    folder = make_folder(directory / "images")
    config = folder_run(folder)
    config.steps = 8
    return folder, directory / "run", train(config, directory / "run")


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "images")


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


@pytest.fixture
def config(folder):
    config = folder_run(folder)
    config.steps = 8
    return config


def _all(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_the_same_data_elsewhere_goes_on(config, folder, workdir, finished, monkeypatch):
    monkeypatch.chdir(folder.parent)
    config.data.source = "folder:./images/"
    assert train(config, workdir) == finished[2]
    config.steps = 10
    assert train(config, workdir).count == 24


def _rename(folder):
    for split in ("train", "val"):
        (folder / split / "green").rename(folder / split / "a_green")


def test_a_renamed_class_is_named_and_nothing_is_touched(config, folder, workdir):
    _rename(folder)
    before = _all(workdir)
    expected = (
        "was trained on other data: of the training images, class green is called a_green now; "
        "of the training images, class blue is number 1 and was 0; of the evaluation images, class "
        "green is called a_green now; .*; restore the data .* by --config.data.accept_changes=true"
    )
    with pytest.raises(UserError, match=expected):
        train(config, workdir)
    assert _all(workdir) == before


def test_accepted_changes_are_recorded(config, folder, workdir, finished, capsys):
    _rename(folder)
    config.data.accept_changes = True
    # The labels of two classes are exchanged, so it must be accepted explicitly.
    assert train(config, workdir).errors > finished[2].errors
    assert "warning: the data changed, as accepted: of the training images" in (
        capsys.readouterr().out
    )
    config.steps = 10
    train(config, workdir)
    sessions = json.loads((workdir / "sessions.json").read_text())
    assert "class green is called a_green now" in sessions[-1]["data_changes"][0]
    result = json.loads((workdir / "result.json").read_text())
    assert result["sessions"] == sessions
    # From then on the run has the changed data.
    config.data.accept_changes = False
    train(config, workdir)
    _rename_back(folder)
    with pytest.raises(UserError, match="class a_green is called green now"):
        train(config, workdir)


def test_a_run_keeps_its_order_of_classes_where_another_version_sorts_otherwise(
    config, workdir, finished, monkeypatch
):
    """As a run on directories named by numbers, which were sorted as text."""
    monkeypatch.setattr(
        "resnet_flax.data.sources.folder.ordered", lambda names: tuple(sorted(names, reverse=True))
    )
    assert train(config, workdir) == finished[2]


def _rename_back(folder):
    for split in ("train", "val"):
        (folder / split / "a_green").rename(folder / split / "green")


def test_a_result_is_of_the_data_that_was_evaluated(config, folder, workdir, finished):
    def errors():
        return json.loads((workdir / "result.json").read_text())["errors"]

    _rename(folder)
    config.data.accept_changes = True
    worse = train(config, workdir).errors
    assert errors() == worse > finished[2].errors
    _rename_back(folder)
    config.data.accept_changes = False
    train(config, workdir)
    assert errors() == finished[2].errors


@pytest.mark.parametrize("accept", [False, True])
def test_an_added_class_is_no_damaged_checkpoint(config, folder, workdir, accept):
    shutil.copytree(folder / "train" / "red", folder / "train" / "pink")
    config.data.accept_changes = accept
    with pytest.raises(
        UserError, match=r"class pink added; .* has 3 classes and the data has 4 now"
    ):
        train(config, workdir)
    assert not (workdir / "damaged").exists()
    assert Checkpoints(workdir / "checkpoints", keep=1).steps() == [8]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda f: (f / "train/red/001.png").unlink(),
            "training images, 1 file removed: red/001.png",
        ),
        (
            lambda f: shutil.copy(f / "val/red/001.png", f / "val/red/100.png"),
            "evaluation images, 1 file added: red/100.png",
        ),
        (
            lambda f: shutil.copy(f / "train/red/001.png", f / "train/red/002.png"),
            "training images, 1 file changed: red/002.png",
        ),
    ],
)
def test_images_exchanged_removed_or_added_are_named(config, folder, workdir, change, expected):
    change(folder)
    with pytest.raises(UserError, match=expected):
        train(config, workdir)


def test_another_evaluation_split_is_no_change_of_the_data(config, workdir):
    config.data.eval_split = "train"
    assert train(config, workdir).count == 48


def test_another_kind_of_data_is_named(config, workdir, data_dir):
    config.data.source, config.data.data_dir = "tfds:digits", data_dir
    config.data.eval_split = "test"
    config.data.exif, config.data.alpha = "on", "white"  # as folders have by default
    with pytest.raises(UserError, match="it is of kind tfds and was of kind folder"):
        train(config, workdir)


def test_a_rebuilt_tfds_set_is_named_but_not_to_a_checkpoint_without_digests(
    data_dir, tmp_path, monkeypatch
):
    config = short_run(shutil.copytree(data_dir, tmp_path / "tfds").as_posix())
    config.steps, config.optim.warmup_steps, config.eval.every = 2, 1, 0
    fingerprint = TfdsSource.fingerprint

    def without(self):
        return {name: value for name, value in fingerprint(self).items() if name != "digests"}

    monkeypatch.setattr(TfdsSource, "fingerprint", without)
    train(config, tmp_path / "run")
    monkeypatch.undo()
    before = (tmp_path / "run" / "result.json").read_bytes()
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    config.steps = 4
    train(config, tmp_path / "run")  # and saves the digests
    (file,) = (tmp_path / "tfds").rglob("digits-train.*")
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"of the training images, 1 file changed: digits-train"):
        train(config, tmp_path / "run")


def test_a_checkpoint_from_before_there_were_fingerprints(
    config, folder, workdir, finished, monkeypatch
):
    """The names of its classes are compared, and its config's data."""
    shutil.rmtree(workdir)
    save = Checkpoints.save

    def without(self, step, state, about):
        kept = {name: about[name] for name in ("config", "class_names", "preprocessing")}
        save(self, step, state, kept)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", without)
    assert train(config, workdir) == finished[2]
    assert "data" not in read_meta(workdir / "checkpoints" / "8")
    assert train(config, workdir) == finished[2]
    config.data.source += "/"
    with pytest.raises(UserError, match=r"another config: data.source is"):
        train(config, workdir)
    config.data.source = config.data.source[:-1]
    _rename(folder)
    with pytest.raises(UserError, match=r"class green removed; .*class a_green added"):
        train(config, workdir)


def test_a_whole_checkpoint_of_another_network_is_not_called_damaged(config, workdir, monkeypatch):
    """As if another version of the package made another network from the same config."""
    monkeypatch.setattr("resnet_flax.training.resume.conflicts", lambda *_: {})
    config.model.overrides = config.model.overrides.replace("16", "32")
    with pytest.raises(UserError, match=r"optimiser: batch_s.* is \[16\] there, but \[32\] with"):
        train(config, workdir)
    assert not (workdir / "damaged").exists()

"""Splits without images or without labels are refused in one sentence, before anything else."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from experiments import ROOT
from photographs import make_folder
from PIL import Image

import resnet_flax
from resnet_flax.apply.experiment import make_run, train
from resnet_flax.cli import main
from resnet_flax.data import batches
from resnet_flax.data.pipeline import Examples
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import ArraySource, open_source
from resnet_flax.data.sources.tfds import TfdsSource
from resnet_flax.data.sources.tfds_features import check_features
from resnet_flax.errors import UserError
from resnet_flax.evaluation.labels import as_outputs
from resnet_flax.evaluation.pretrained import evaluate_pretrained

FLAT = tuple(f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(4))


@pytest.fixture
def folder(tmp_path):
    """Three classes to train on, and ImageNet's validation images as they arrive."""
    root = make_folder(tmp_path / "set", train=4, val=1)
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    for name in FLAT:
        Image.new("RGB", (8, 8)).save(root / "val" / name)
    return root


@pytest.fixture
def model(monkeypatch):
    """What `eval` evaluates, instead of a network with weights."""
    network = SimpleNamespace(num_classes=3)
    opened = SimpleNamespace(
        model=network, config={}, class_names=(), preprocessing=Preprocessing(8), variables={}
    )
    monkeypatch.setattr("resnet_flax.cli.eval._open_models", lambda arguments: [opened])
    return opened


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    "command",
    [
        "data check folder:{}",
        "data check folder:{} --split=val",
        "eval a_model --data=folder:{}",
        "train {run} --workdir={}/run",
        "sweep {run} --workdir={}/run --seeds=0,1",
    ],
)
def test_every_command_says_that_the_images_are_not_in_classes(folder, capsys, command):
    keys = {"data.source": f"folder:{folder}", "data.eval_split": "val", "batch_size": 8}
    run = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    assert main(command.format(folder, run=run).split()) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {folder}/val has no subdirectories for classes, but 4 images directly in it "
        f"({', '.join(FLAT[:3])}, ...); move each into a subdirectory named after its class as "
        "docs/data.md shows, or give another split\n"
    )
    assert not list((folder / "run").glob("**/checkpoints"))


def test_the_page_moves_imagenet_s_images_into_their_classes(shared_data, tmp_path):
    images = list((shared_data / "imagenette" / "val").rglob("ILSVRC2012_val_*"))
    for image in images:
        (tmp_path / image.name).touch()
    page = (ROOT / "docs" / "data.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "ILSVRC2012" in c)
    exec(code.replace("/data/imagenet/val", str(tmp_path)), {})
    found = {f"{file.parent.name}/{file.name}" for file in tmp_path.rglob("*.JPEG")}
    assert found == {f"{image.parent.name}/{image.name}" for image in images}
    assert len(found) > 10


def _flat(split):
    for file in split.rglob("*.png"):
        file.rename(split / f"{file.parent.name}_{file.name}")
    for name in ("blue", "green", "red"):
        (split / name).rmdir()


def _suffix(split):
    for file in (split / "red").iterdir():
        file.rename(file.with_suffix(".heic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "has no directory 'val' for that split .it has train"),
        (lambda split: [shutil.rmtree(one) for one in split.iterdir()], "val has no subdirec"),
        (lambda split: [f.unlink() for f in split.rglob("*.png")], r"blue has no images \(.jpg"),
        (_suffix, r"val/red has 2 files \(000.heic, 001.heic\) but no image \(.jpg, "),
        (
            _flat,
            r"but 6 images directly in it \(blue_000.png, .*; move each into .* class, or give",
        ),
        (
            lambda split: [_flat(split), (split / "ILSVRC2012_test_1.JPEG").touch()],
            "whose classes are not public: give another split",
        ),
    ],
    ids=["no split", "no classes", "empty classes", "an empty class", "flat", "ImageNet's test"],
)
def test_what_was_found_instead_of_images_is_said(tmp_path, change, message):
    root = make_folder(tmp_path, train=1, val=2)
    change(root / "val")
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{root}", "val")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("train", "blue, green, red are classes, give folder:{} and the split 'train'"),
        ("train/red", "its 1 image (000.png) must be in {}/train/red/SPLIT/CLASS"),
    ],
)
def test_the_directory_of_a_split_or_a_class_is_no_data_set(tmp_path, capsys, where, message):
    root = make_folder(tmp_path, train=1)
    assert main(["data", "check", f"folder:{root / where}"]) == 2
    assert message.format(root) in capsys.readouterr().err


def test_arrays_and_sources_without_examples_are_refused(config, tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    some, none = (images, np.arange(4) % 2), (images[:0], np.zeros(0, int))
    for data, eval_data in ((none, some), (some, none), (ArraySource(*none, ("a", "b")), some)):
        with pytest.raises(UserError, match="data has no examples"):
            resnet_flax.train(config, tmp_path / "run", data=data, eval_data=eval_data)
    empty = ArraySource(*none, ("a", "b"))
    for use in (batches, lambda source: evaluate_pretrained([], source, batch_size=1)):
        with pytest.raises(UserError, match="has no examples"):
            use(empty)


def test_an_empty_split_of_a_tfds_set_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    info = next(tmp_path.rglob("dataset_info.json"))
    described = json.loads(info.read_text())
    described["splits"][1]["shardLengths"] = ["0"]
    info.write_text(json.dumps(described))
    with pytest.raises(UserError, match="the split 'test' of tfds:digits is empty"):
        open_source("tfds:digits", "test", str(tmp_path / "copy"))


CLASSES = tfds.features.ClassLabel(names=["a", "b"])
LABELS = {
    "lists": (tfds.features.Sequence(CLASSES), lambda i: [i % 2], "are lists, of several classes"),
    "arrays": (
        tfds.features.Tensor(shape=(2,), dtype=np.int64),
        lambda i: np.eye(2, dtype=np.int64)[i % 2],
        "are lists, of several classes",
    ),
    "numbers": (np.int64, lambda i: i % 2, r"are numbers \(int64\) without classes"),
    "floats": (np.float32, lambda i: i % 2, r"are numbers \(float32\) without classes"),
    "text": (tfds.features.Text(), lambda i: "ab"[i % 2], "are text"),
    "missing": (None, None, r"it lacks label \(it has image\)"),
    "unlabelled": (CLASSES, lambda i: -1, "example 0 .* has the label -1, .* labelled split"),
    "some unlabelled": (CLASSES, lambda i: -(i % 2), "example 1 .* has the label -1"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_a_tfds_set_that_are_not_one_class_are_refused(config, tmp_path, capsys, kind):
    feature, label, message = LABELS[kind]
    name = kind.replace(" ", "_")
    with tfds.core.registered.skip_registration():
        _builder(name, feature, label)(data_dir=tmp_path).download_and_prepare()
    capsys.readouterr()
    config.data.update(source=f"tfds:{name}", data_dir=str(tmp_path))
    for use in (
        lambda: open_source(f"tfds:{name}", "test", str(tmp_path)),
        lambda: train(config, tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=message):
            use()
    assert main(["data", "check", f"tfds:{name}", f"--data_dir={tmp_path}"]) == 2
    assert re.search(message, capsys.readouterr().err)


def _builder(kind, feature, label):
    """A TFDS data set of eight small images."""
    features = {"image": tfds.features.Image(shape=(8, 8, 3))}
    features |= {"label": feature} if feature is not None else {}

    class Builder(tfds.core.GeneratorBasedBuilder):
        name, VERSION, RELEASE_NOTES = kind, tfds.core.Version("1.0.0"), {}

        def __init__(self, **keywords):
            super().__init__(**keywords, file_format="array_record")

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in ("train", "test")}

        def _generate_examples(self):
            for i in range(8):
                example = {"image": Image.new("RGB", (8, 8), (i, i, i))}
                yield i, example | ({"label": label(i)} if label else {})

    return Builder


def test_the_number_of_classes_must_be_known():
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel()}
    with pytest.raises(UserError, match="of tfds:x are of an unknown number of classes; give"):
        check_features("tfds:x", features, "label")


class Labelled(list):
    """A source with given labels."""

    class_names = ("a", "b")

    def __getitem__(self, index):
        return {"image": np.zeros((8, 8, 1), np.uint8), "label": super().__getitem__(index)}


@pytest.mark.parametrize("label", [-1, 2, 0.5, [0], np.zeros(1, int), "a", True])
def test_labels_of_any_source_are_checked_before_they_are_used(config, label):
    config.data.in_memory = config.data.resident = False
    source = Labelled([label, 0, 1, 0])
    message = "has the label .*; labels must be whole numbers from 0 to 1"
    with pytest.raises(UserError, match=message):
        Examples(source, lambda image: image)[0]
    with pytest.raises(UserError, match=message):
        as_outputs(source, ("b", "a"), 2)[0]
    with pytest.raises(UserError, match=message):
        make_run(config, splits=(source, Labelled([0])))  # before the first batch


def test_one_of_several_labels_that_is_no_class_is_refused():
    example = {"image": b"", "label": 0, "real": [1, -1]}
    source = TfdsSource("tfds:x", [example], ("a", "b"), 3, ("label", "real"))
    with pytest.raises(UserError, match="example 0 of tfds:x has the label -1, which is not one"):
        source.check_labels()


def test_training_and_evaluation_note_what_they_leave_out(config, capsys, model, tmp_path):
    folder = make_folder(tmp_path, train=4, val=1)
    for name in ("train/red/x", "train/beside.png", "train/red/.DS_Store", "val/blue/1.heic"):
        (folder / name).touch()
    config.data.update(source=f"folder:{folder}", eval_split="val", holdout=0.1)
    config.batch_size, config.data.in_memory = 8, False
    make_run(config)
    train = (
        "note: the split 'train' leaves out 1 file beside the directories of the classes (beside.p"
    )
    val = "note: the split 'val' leaves out 1 file ending in .heic (blue/1.heic)"
    first, second = capsys.readouterr().err.splitlines()
    assert (first[: len(train)], second) == (train, val)
    assert "1 file without a suffix (red/x)" in first
    model.class_names = ("none of them",)
    assert main(["eval", "a_model", f"--data=folder:{folder}"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == val

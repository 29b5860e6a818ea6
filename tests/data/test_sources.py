"""TFDS sets, folders of images, arrays."""

import io
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from resnet_flax.apply.tables import default_config
from resnet_flax.cli import main
from resnet_flax.data import batches
from resnet_flax.data.experiment import open_splits
from resnet_flax.data.fingerprint import differences, take
from resnet_flax.data.in_memory import in_memory
from resnet_flax.data.sources import ArraySource, check_source, hold_out, open_source
from resnet_flax.data.sources.tfds import TfdsSource, prepare
from resnet_flax.errors import UserError

NAMES = tuple(map(str, range(100)))


def test_the_last_360_scans_are_the_test_split(data_dir):
    raw = load_digits()
    for split, rows in (("train", slice(0, 1437)), ("test", slice(1437, 1797))):
        source = in_memory(open_source("tfds:digits", split, data_dir))
        examples = [source[i] for i in range(len(source))]
        images = np.stack([e["image"] for e in examples])
        labels = [int(e["label"]) for e in examples]
        assert images.dtype == np.uint8
        assert images.shape[1:] == (8, 8, 1)
        np.testing.assert_array_equal(np.round(images[..., 0] / 255 * 16), raw.images[rows])
        np.testing.assert_array_equal(labels, raw.target[rows])
        assert source.class_names == tuple("0123456789")


def test_tfds_reads_it_by_name_without_tensorflow(data_dir):
    split = tfds.data_source("digits", split="test", data_dir=data_dir)
    assert split[5]["id"] == 1442
    assert "tensorflow" not in sys.modules


def test_splits_can_be_sliced(data_dir):
    first = open_source("tfds:digits", "train[:1000]", data_dir)
    rest = open_source("tfds:digits", "train[1000:]", data_dir)
    assert (len(first), len(rest)) == (1000, 437)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digits", "train", "a data set must be tfds:NAME or folder:DIR"),
        ("tfds:", "train", "a data set must be tfds:NAME or folder:DIR"),
        ("tfds:digit", "train", "no data set called 'digit'; did you mean digits"),
        ("tfds:../x", "train", "TFDS cannot open '../x': "),
        ("tfds:digits/2.0", "train", "TFDS cannot open 'digits/2.0': "),
        (
            "tfds:digits",
            "validation",
            r"no split 'validation' \(it has train, test\)",
        ),
        (
            "tfds:cifar10",
            "train",
            "not prepared in .*cifar10.*`resnet-flax data prepare tfds:cifar10`",
        ),
    ],
)
def test_bad_sources_are_explained(data_dir, name, split, message):
    with pytest.raises(UserError, match=message):
        open_source(name, split, data_dir)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test[:10", "the split 'test[:10' is malformed; expected such as test[:10]"),
        ("test[:1.5]", "the split 'test[:1.5]' is malformed"),
        ("test+", "the split 'test+' is malformed"),
        ("test[:0]", "the split 'test[:0]' of tfds:digits is empty"),
        ("test[500:]", "the split 'test[500:]' of tfds:digits is empty"),
        ("test[0:0%]+train[:0]", "of tfds:digits is empty"),
        ("tst[:0]", "no split 'tst[:0]' (it has train, test)"),
    ],
)
def test_a_slice_of_a_split_that_cannot_be_used_is_explained(data_dir, split, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_source("tfds:digits", split, data_dir)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot prepare digits in .*file.*Not a directory"):
        open_source("tfds:digits", "train", str(tmp_path / "file"))


def test_the_word_tensorflow_in_a_path_is_not_taken_for_a_missing_package(tmp_path):
    (tmp_path / "tensorflow_datasets").write_text("a file")
    with pytest.raises(UserError, match="Not a directory; give a directory that can be written"):
        prepare("digits", str(tmp_path / "tensorflow_datasets" / "data"))


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def generate(*_):
        try:
            import no_such_tensorflow  # noqa: F401
        except ImportError as error:
            raise RuntimeError("cannot decode") from error

    monkeypatch.setattr("resnet_flax.data.digits.Digits._generate_examples", generate)
    with pytest.raises(UserError, match=r"cannot decode; it needs TensorFlow: pip install 'resnet"):
        prepare("digits", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("dataset_info.json", lambda file: file.unlink()),
        ("dataset_info.json", lambda file: file.write_bytes(file.read_bytes()[:600])),
        ("digits-train.array_record-00000-of-00001", lambda file: file.unlink()),
        ("digits-train.array_record-00000-of-00001", lambda file: file.write_bytes(b"")),
        ("digits-train.array_record-00000-of-00001", lambda file: os.truncate(file, 100_000)),
    ],
    ids=["no description", "half a description", "no examples", "empty", "half the examples"],
)
def test_a_damaged_set_can_be_repaired_as_the_message_says(data_dir, tmp_path, file, damage):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    damage(copy / "digits" / "1.0.0" / file)
    with pytest.raises(UserError) as error:
        open_source("tfds:digits", "train", str(copy))[0]
    remedy = re.search(r"remove (\S+) and run `resnet-flax ([^`]*)`", str(error.value))
    assert remedy[2] == f"data prepare tfds:digits --data_dir={copy}"
    assert main(remedy[2].split()) == 2  # which does nothing as long as the directory is there
    shutil.rmtree(remedy[1])
    assert main(remedy[2].split()) == 0
    assert open_source("tfds:digits", "train", str(copy))[0]["label"] == 0


def test_a_file_of_a_set_that_is_gone_is_named(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    source = open_source("tfds:digits", "train", str(copy))
    (copy / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"of-00001 cannot be read: No such file .*; remove .* and"):
        source.fingerprint()


@pytest.fixture
def folder(tmp_path):
    """Three classes with 4, 5 and 6 images to train on, and one each to evaluate."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, number in (("train", 4 + label), ("val", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(number):
                kind = ("png", "JPEG", "webp", "bmp")[i % 4]
                image = Image.new("RGB", (20 + i, 10), (40 * label, 10 * i, 7))
                image.save(tmp_path / split / name / f"{i}.{kind}", kind.upper())
    return tmp_path


def test_a_folder_has_a_class_a_directory(folder):
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    source = open_source(f"folder:{folder}", "train")
    assert source.class_names == ("ant", "bee", "cat")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0] * 4 + [1] * 5 + [2] * 6
    image = source[5]["image"]  # bee/1.JPEG
    assert image.size == (21, 10)
    assert np.abs(np.asarray(image) - (40, 10, 7)).max() <= 3
    assert len(open_source(f"folder:{folder}", "val")) == 3


def test_a_split_may_lack_classes_that_the_training_images_have(folder):
    for file in (folder / "val" / "bee").iterdir():
        file.unlink()
    (folder / "val" / "bee").rmdir()
    source = open_source(f"folder:{folder}", "val")
    assert source.class_names == ("ant", "bee", "cat")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 2]


def test_bad_folders_are_explained(folder, tmp_path):
    def explained(message, split="train", where=folder):
        with pytest.raises(UserError, match=message):
            open_source(f"folder:{where}", split)

    explained(
        r"no directory 'vall' for that split; did you mean val\? \(it has train, val\)", "vall"
    )
    explained("/nowhere cannot be read: No such file or directory", where=tmp_path / "nowhere")
    (folder / "val" / "dog").mkdir()
    explained(r"val/dog is a class without training images", "val")
    (folder / "train" / "dog").mkdir()
    explained(r"train/dog has no images \(.jpg, .*\); add some, or remove it")
    (folder / "flat" / "train").mkdir(parents=True)
    (folder / "flat" / "train" / "a.png").write_bytes(b"")
    explained(r"flat/train has no subdirectories", where=folder / "flat")
    (folder / "train" / "dog" / "0.png").write_bytes(b"no image")
    source = open_source(f"folder:{folder}", "train")
    with pytest.raises(UserError, match=r"train/dog/0.png cannot be decoded .* damaged"):
        source[len(source) - 1]


def test_an_unreadable_directory_is_explained(folder):
    secret = folder / "train" / "bee"
    secret.chmod(0)
    # As root, only without the capabilities that override permissions.
    dropped = "--bounding-set=-dac_override,-dac_read_search"
    wrapper = ["setpriv", dropped] if os.geteuid() == 0 else []
    if wrapper and not shutil.which("setpriv"):
        pytest.skip("as root, needs setpriv")
    program = "import sys, resnet_flax.data.sources as s; s.open_source(*sys.argv[1:])"
    arguments = [sys.executable, "-c", program, f"folder:{folder}", "train"]
    done = subprocess.run([*wrapper, *arguments], capture_output=True, text=True, check=False)
    secret.chmod(0o755)
    assert "bee cannot be read: Permission denied" in done.stderr.splitlines()[-1]


def test_a_holdout_is_the_same_for_every_seed_and_no_training_example():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    train, held_out = hold_out(ArraySource(images, np.arange(100), NAMES), 0.1)
    ids = [[int(s[i]["label"]) for i in range(len(s))] for s in (train, held_out)]
    assert list(map(len, ids)) == [90, 10]
    assert sorted(ids[0] + ids[1]) == list(range(100))
    assert ids[1] == [2, 17, 25, 27, 32, 44, 47, 51, 73, 96]
    assert held_out[3]["image"][0, 0, 0] == ids[1][3]
    assert train.class_names == NAMES
    for share in (0.004, 0.996):
        with pytest.raises(UserError, match=r"data.holdout=0.\d+ of 100 training examples is"):
            hold_out(ArraySource(images, np.arange(100), NAMES), share)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3, 1)), [0, 1], "images must be uint8 .*, not float64 of"),
        (np.zeros((3, 3), np.uint8), [0, 1, 1], "images must be uint8 .* not uint8 of"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, 1, 1], "labels must be 2 whole numbers"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0.0, 1.0], "labels must be 2 whole numbers"),
        (np.zeros((2, 3, 3, 1), np.uint8), [0, 2], "labels must be from 0 to 1, .* not 0 to 2"),
        (np.zeros((2, 3, 3, 1), np.uint8), [-1, 1], "labels must be from 0 to 1, .* not -1"),
    ],
)
def test_arrays_that_are_no_data_set_are_explained(images, labels, message):
    with pytest.raises(UserError, match=message):
        ArraySource(images, labels, ("a", "b"))
    with pytest.raises(UserError, match="batch_size and epochs must be at least 1"):
        batches(ArraySource(np.zeros((2, 3, 3, 1), np.uint8), [0, 1], "ab"), batch_size=0)


def test_the_classes_are_those_of_the_training_images_whatever_its_directory_is_called(folder):
    (folder / "train").rename(folder / "training")
    shutil.rmtree(folder / "val" / "ant")
    data = default_config().data
    data.update(source=f"folder:{folder}", train_split="training", eval_split="val")
    train, held_out = open_splits(data)
    assert train.class_names == held_out.class_names == ("ant", "bee", "cat")
    assert [int(held_out[i]["label"]) for i in range(2)] == [1, 2]
    (folder / "val" / "dog").mkdir()
    with pytest.raises(UserError, match="val/dog is a class without training images"):
        open_splits(data)


def test_images_below_a_class_s_directory_are_its_own(folder):
    (folder / "train" / "ant" / "more" / "still").mkdir(parents=True)
    Image.new("L", (3, 2), 9).save(folder / "train" / "ant" / "more" / "still" / "x.pgm")
    source = open_source(f"folder:{folder}", "train")
    assert len(source) == 16
    assert source[4]["image"].size == (3, 2)
    assert int(source[4]["label"]) == 0


def test_what_the_file_system_refuses_is_said_in_its_words(folder):
    (folder / "train" / "ant" / "9.png").symlink_to(folder / "nowhere")
    source = open_source(f"folder:{folder}", "train")
    with pytest.raises(UserError, match=r"ant/9.png cannot be read: No such file or directory"):
        source[4]
    os.mkdir(os.fsencode(folder / "train") + b"/d\xff")
    with pytest.raises(UserError, match=r"directory named 'd\\udcff'; .* valid UTF-8 without"):
        open_source(f"folder:{folder}", "train")


def _class_of_each(source):
    """The directory and the label of every image."""
    files = [file.partition("/")[0] for file, _ in source.files]
    return [(name, int(source[i]["label"])) for i, name in enumerate(files)]


def _empty_classes(directory, *names):
    for name in names:
        for split in ("train", "val"):
            (directory / split / name).mkdir(parents=True)
            Image.new("L", (2, 2)).save(directory / split / name / "0.png")
    return f"folder:{directory}"


def test_directories_named_by_numbers_are_these_classes(tmp_path):
    numbers = tuple(map(str, range(12)))
    name = _empty_classes(tmp_path, *numbers)
    for split in ("train", "val"):
        source = open_source(name, split)
        assert source.class_names == numbers
        assert all(int(directory) == label for directory, label in _class_of_each(source))
    # The order of examples, on which a holdout and a run that continues depend, stays as it was.
    assert [file for file, _ in source.files] == [f"{one}/0.png" for one in sorted(numbers)]
    padded = open_source(_empty_classes(tmp_path / "padded", "00", "08", "010"), "val")
    assert padded.class_names == ("00", "08", "010")
    (tmp_path / "padded" / "val" / "08").rename(tmp_path / "padded" / "val" / "8")
    assert _class_of_each(open_source(f"folder:{tmp_path}/padded", "val"))[2] == ("8", 1)
    mixed = open_source(_empty_classes(tmp_path / "mixed", "2", "10", "other"), "train")
    assert mixed.class_names == ("10", "2", "other")


def test_a_folder_takes_the_order_of_another_list_of_its_classes(folder):
    source = open_source(f"folder:{folder}", "train")
    other = source.in_order_of(("cat", "ant", "bee"))
    assert other.class_names == ("cat", "ant", "bee")
    assert set(_class_of_each(other)) == {("cat", 0), ("ant", 1), ("bee", 2)}
    assert set(_class_of_each(source)) == {("ant", 0), ("bee", 1), ("cat", 2)}
    for names in ((), ("ant", "bee"), ("ant", "bee", "dog"), source.class_names):
        assert source.in_order_of(names) is source


def test_a_class_in_another_unicode_form_is_the_same_class(tmp_path):
    whole, split = "caf\u00e9", "cafe\u0301"
    name = _empty_classes(tmp_path, "tea", whole)
    before = take(open_source(name, "val"))
    (tmp_path / "val" / whole).rename(tmp_path / "val" / split)
    source = open_source(name, "val")
    assert source.class_names == (whole, "tea")
    assert _class_of_each(source) == [(split, 0), ("tea", 1)]
    assert take(source) == before
    older = {**before, "class_names": [split, "tea"]}
    older["classes"] = {split: before["classes"][whole], "tea": before["classes"]["tea"]}
    assert differences(older, take(source), {}, {}) == []
    (tmp_path / "train" / split).mkdir()
    shutil.copy(tmp_path / "train" / "tea" / "0.png", tmp_path / "train" / split)
    both = open_source(name, "train")
    assert both.class_names == (whole, "tea")
    assert sorted(_class_of_each(both)) == [(split, 0), (whole, 0), ("tea", 1)]


def test_all_names_that_can_be_encoded_are_read(tmp_path):
    classes = (
        "a\u00a0b",
        "\u0642\u0627\u0628\u200c\u0647\u0627",
        "\u0915\u094d\u200d\u0937",
        "\U0001f98a",
    )
    name = _empty_classes(tmp_path, *classes)
    for file in (
        "Screenshot at 10.30\u202fAM.png",
        "\U0001f469\u200d\U0001f52c.png",
        "line\nbreak.png",
    ):
        shutil.copy(
            tmp_path / "train" / classes[0] / "0.png", tmp_path / "train" / classes[0] / file
        )
    source = open_source(name, "train")
    assert source.class_names == tuple(sorted(classes))
    assert len([source[i] for i in range(len(source))]) == 7
    (tmp_path / "train" / classes[0] / "line\nbreak.png").write_bytes(b"\x1b[2J")
    source = open_source(name, "train")
    broken = next(i for i, (file, _) in enumerate(source.files) if "break" in file)
    with pytest.raises(UserError, match=r"/line\\nbreak.png cannot be decoded"):
        source[broken]


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "\x1b[2J", "a\tb"])
def test_names_of_classes_that_break_a_line_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"has a directory named '.*\\.*without line breaks"):
        open_source(_empty_classes(tmp_path, name), "train")
    source = ArraySource(np.zeros((1, 2, 2, 1), np.uint8), [0], (name,))
    with pytest.raises(UserError, match=r"class_names of data have '.*\\.*without line breaks"):
        check_source(source, "data")


def test_a_file_whose_name_cannot_be_encoded_is_refused_if_it_is_an_image(folder):
    there = os.fsencode(folder / "train" / "ant")
    for name in (b"\xff.txt", b"\xff.png"):
        os.close(os.open(there + b"/" + name, os.O_CREAT))
        if name.endswith(b"txt"):
            assert len(open_source(f"folder:{folder}", "train")) == 15
    with pytest.raises(UserError, match=r"named '\\udcff.png', which is not valid UTF-8; rename"):
        open_source(f"folder:{folder}", "train")


def test_tfds_s_own_format_is_explained(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/digits", tmp_path / "digits")
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"prepared as tfrecord, .*convert_format --dataset_ver"):
        open_source("tfds:digits", "train", str(tmp_path))


def test_labels_that_are_no_classes_are_explained():
    class Examples(list):
        def __getitem__(self, index):
            file = io.BytesIO()
            Image.new("RGB", (2, 2)).save(file, "PNG")
            return {"image": file.getvalue(), "label": -1}

    source = TfdsSource("tfds:x", Examples([0]), ("a", "b"), 3)
    with pytest.raises(
        UserError, match="example 0 of tfds:x has the label -1, which is not one of"
    ):
        source[0]


def test_only_images_of_one_size_are_kept_in_memory(folder):
    with pytest.raises(
        UserError, match=r"of the same size .* \(10, 20, 3\) and number 1 .*10, 21, 3"
    ):
        in_memory(open_source(f"folder:{folder}", "train"))


def test_cifar_is_read_bit_for_bit(shared_data):
    source = open_source("tfds:cifar10", "test", str(shared_data / "tfds"))
    raw = tfds.data_source("cifar10", split="test", data_dir=str(shared_data / "tfds"))
    assert len(source) == 10_000
    assert source.class_names[3] == "cat"
    for i in (0, 17, 9999):
        np.testing.assert_array_equal(np.asarray(source[i]["image"]), raw[i]["image"])
        assert source[i]["label"] == raw[i]["label"]

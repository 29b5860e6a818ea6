"""Which files of a folder are read, what is said of the others, and what torchvision reads."""

import importlib.util
import shutil

import numpy as np
import pytest
from PIL import Image, features

from resnet_flax.cli import main
from resnet_flax.data.fingerprint import take
from resnet_flax.data.sources import open_source
from resnet_flax.data.sources.image_files import IMAGES, TORCHVISION
from resnet_flax.errors import UserError

FORMATS = {".jpe": "JPEG", ".jfif": "JPEG", ".gif": "GIF", ".avif": "AVIF", ".jp2": "JPEG2000"}
MIXED = ("0.jpg", *(f"1{suffix}" for suffix in FORMATS), "2", "3.heic", "._0.jpg")


def _write(*files):
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = FORMATS.get(file.suffix, "PNG" if file.suffix == ".png" else "JPEG")
        Image.new("RGB", (16, 12), (40 * i % 256, 90, 200)).save(file, kind)


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds in two classes to train on, and two images to evaluate."""
    root = tmp_path / "set"
    _write(*(root / "train" / name / file for name in ("ant", "bee") for file in MIXED))
    _write(root / "train" / "beside.png", root / "train" / "labels.csv")
    _write(root / "val" / "ant" / "0.png", root / "val" / "bee" / "0.png")
    return root


def test_check_counts_every_file_and_says_why_it_is_left_out(folder, capsys):
    assert main(["data", "check", f"folder:{folder}", "--all"]) == 0
    train, val = capsys.readouterr().out.split("val: ")
    assert train.splitlines() == [
        "train: 12 images, 2 classes (ant, bee)",
        "  left out: 2 files hidden, as their names begin with a dot or __MACOSX: ant/._0.jpg, "
        "bee/._0.jpg",
        "  left out: 2 files without a suffix: ant/2, bee/2",
        "  left out: 2 files ending in .heic: ant/3.heic, bee/3.heic",
        "  left out: 1 file beside the directories of the classes: beside.png",
        "  left out: 1 file ending in .csv: labels.csv",
        "  torchvision's ImageFolder would read 4 images; leave out .avif, .gif, .jfif, .jp2, "
        ".jpe; read what is hidden (ant/._0.jpg, bee/._0.jpg)",
    ]
    assert val == "2 images, 2 classes (ant, bee)\n"
    assert sum(file.is_file() for file in (folder / "train").rglob("*")) == 12 + 2 + 2 + 2 + 1 + 1


def test_what_is_beside_the_splits_is_named_and_ends_nothing(folder, capsys):
    _write(folder / "__MACOSX" / "train" / "ant" / "._0.jpg", folder / "train/ant/__MACOSX/1.jpg")
    _write(folder / "docs" / "images" / "figure.png", folder / "TEST" / "ant" / "0.png")
    _write(folder / "more" / "ant" / "0.png", folder / "README")
    assert main(["data", "check", f"folder:{folder}"]) == 0
    out = capsys.readouterr().out
    counted = [line for line in out.splitlines() if " images, " in line]
    assert [line.partition(":")[0] for line in counted] == ["TEST", "more", "train", "val"]
    assert "read what is hidden (ant/._0.jpg, ant/__MACOSX/1.jpg, bee/._0.jpg)" in out
    assert "beside the splits, left out: README, __MACOSX, docs" in out
    for name in ("train", "val", "TEST", "more"):
        shutil.rmtree(folder / name)
    _write(folder / "day" / "ant" / "0.png", folder / "night" / "ant" / "0.png")
    assert main(["data", "check", f"folder:{folder}", "--split=night"]) == 0
    assert capsys.readouterr().out == "night: 1 images, 1 classes (ant)\n"


def test_the_first_image_of_a_file_is_read_in_every_format(folder):
    _write(folder / "train" / "ant" / "more" / "0.JPE")
    frames = [Image.new("RGB", (4, 4), color) for color in ((200, 0, 0), (0, 0, 200))]
    frames[0].save(folder / "train/ant/two.gif", save_all=True, append_images=frames[1:])
    source = open_source(f"folder:{folder}", "train")
    for i, (file, _) in enumerate(source.files):
        pixels = np.asarray(source[i]["image"])
        name = file.rpartition("/")[2]
        if name == "two.gif":
            np.testing.assert_array_equal(pixels, np.asarray(frames[0]))
        elif "more" not in file:
            color = (40 * (MIXED.index(name) + len(MIXED) * file.startswith("bee")) % 256, 90, 200)
            assert np.abs(pixels.astype(int) - color).max() <= 12, file
    assert len(source) == 14


def test_a_format_that_pillow_lacks_is_no_reason_to_read_fewer_images(folder, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(
        UserError, match=r"2 files ending in .avif cannot be read by this Pillow \(ant/1"
    ):
        open_source(f"folder:{folder}", "train")


def test_a_set_of_the_former_suffixes_has_the_former_fingerprint(tmp_path):
    assert IMAGES[: len(TORCHVISION)] == TORCHVISION
    for name in ("ant", "bee"):
        for suffix in TORCHVISION:
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name / f"0{suffix}").write_bytes(b"image")
    found = take(open_source(f"folder:{tmp_path}", "train"))
    golden = [9, "c8a686aa09344a1b", "6105d6cc76af4003"]  # of the version before .gif was read
    assert found["classes"] == {"ant": golden, "bee": golden}


TORCHVISION_CASES = {
    "the same": (("ant/0.png", "bee/0.png"), 2, ["ant", "bee"], ""),
    "another suffix": (
        ("ant/0.png", "ant/1.gif", "bee/0.png"),
        *(2, ["ant", "bee"]),
        "would read 2 images; leave out .gif",
    ),
    "a hidden directory": (
        (".cache/0.png", "ant/0.png", "bee/0.png"),
        *(3, [".cache", "ant", "bee"]),
        "would have 3 classes; read 3 images; read what is hidden (.cache/0.png); "
        "number ant 1 and not 0",
    ),
    "a class without images": (
        ("ant/0.png", "bee/0.gif"),
        *(None, None),
        "would refuse it, as it reads no image in bee",
    ),
    "not all classes": (("bee/0.png",), 1, ["bee"], "would number bee 0 and not 1"),
}


@pytest.mark.parametrize("case", TORCHVISION_CASES.values(), ids=TORCHVISION_CASES)
def test_what_torchvision_would_read(tmp_path, case):
    files, number, classes, said = case
    _write(tmp_path / "train" / "ant" / "0.png", tmp_path / "train" / "bee" / "0.png")
    _write(*(tmp_path / "val" / file for file in files))
    assert open_source(f"folder:{tmp_path}", "val").torchvision_view() == said
    if not importlib.util.find_spec("torchvision"):
        return
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert IMG_EXTENSIONS == TORCHVISION
    if number is None:
        with pytest.raises(FileNotFoundError, match="Found no valid file for the classes bee"):
            ImageFolder(tmp_path / "val")
        return
    theirs = ImageFolder(tmp_path / "val")
    assert (len(theirs), theirs.classes) == (number, classes)

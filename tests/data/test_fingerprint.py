"""Fingerprints of data sets, and the differences between them."""

import os
import shutil

import numpy as np
import pytest
from photographs import make_folder
from PIL import Image

from resnet_flax.data.fingerprint import (
    differences,
    listing,
    read_listings,
    take,
    write_listings,
)
from resnet_flax.data.sources import ArraySource, hold_out, open_source


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", train=4, val=2)


def _open(folder, split="train"):
    return open_source(f"folder:{folder}", split)


def _changed(folder, change):
    """What is said of a folder after a change, with and without the list of its images."""
    before, listed = take(_open(folder)), listing(_open(folder))
    change(folder / "train")
    source = _open(folder)
    now, files = take(source), listing(source)
    return differences(before, now, listed, files), differences(before, now, {}, files)


def test_the_same_images_at_another_place_and_time_are_the_same_data(folder, tmp_path, monkeypatch):
    before = take(_open(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.rglob("*.png"):
        os.utime(file, (1, 1))
    monkeypatch.chdir(tmp_path)
    for path in (copy, f"{folder}/", "images", "./copy/../images"):
        assert take(_open(path)) == before
    (folder / "train" / "red" / "notes.txt").write_text("no image")
    (folder / "train" / "red" / ".hidden.png").write_text("")
    assert take(_open(folder)) == before
    assert before["count"] == 12
    assert before["class_names"] == ["blue", "green", "red"]
    part = hold_out(_open(folder), 0.5)[0]
    assert take(part) == before


@pytest.mark.parametrize(
    ("change", "named", "counted"),
    [
        (
            lambda d: (d / "green").rename(d / "verde"),
            ["class green is called verde now", "class red is number 1 and was 2"],
            ["class green is called verde now", "class red is number 1 and was 2"],
        ),
        (
            lambda d: shutil.copytree(d / "red", d / "pink"),
            ["class pink added", "there are 16 examples and were 12"],
            ["class pink added", "there are 16 examples and were 12"],
        ),
        (
            lambda d: (d / "red" / "001.png").unlink(),
            ["1 file removed: red/001.png", "there are 11 examples and were 12"],
            ["class red has 3 images and had 4", "there are 11 examples and were 12"],
        ),
        (
            lambda d: [shutil.copy(d / "red/001.png", d / f"red/{n}.png") for n in range(4)],
            [
                "4 files added: red/0.png, red/1.png, red/2.png, ...",
                "there are 16 examples and wer",
            ],
            ["class red has 8 images and had 4", "there are 16 examples and were 12"],
        ),
        (
            lambda d: (d / "red/001.png").write_bytes(b"longer" * 1000),
            ["1 file changed: red/001.png"],
            ["images of class red have other names or sizes"],
        ),
        (
            lambda d: (d / "red/001.png").rename(d / "red/9.png"),
            ["1 file removed: red/001.png", "1 file added: red/9.png"],
            ["images of class red have other names or sizes"],
        ),
        (lambda d: None, [], []),
    ],
)
def test_what_changed_is_named(folder, change, named, counted):
    with_list, without = _changed(folder, change)
    assert [text[: len(start)] for text, start in zip(with_list, named, strict=True)] == named
    assert without == counted


def test_two_names_exchanged_are_seen(folder):
    (folder / "train/red/more.png").write_bytes((folder / "train/red/000.png").read_bytes())

    def exchange(directory):
        (directory / "red").rename(directory / "x")
        (directory / "blue").rename(directory / "red")
        (directory / "x").rename(directory / "blue")

    assert _changed(folder, exchange)[1] == [
        "class blue has 5 images and had 4",
        "class red has 4 images and had 5",
    ]


def test_two_classes_exchanged_are_seen_though_names_and_sizes_are_the_same(folder):
    for image in folder.rglob("*.png"):
        with Image.open(image) as opened:
            opened.save(image.with_suffix(".bmp"))
        image.unlink()

    def exchange(directory):
        (directory / "red").rename(directory / "x")
        (directory / "blue").rename(directory / "red")
        (directory / "x").rename(directory / "blue")

    assert _changed(folder, exchange) == (["classes blue, red have other images"],) * 2
    assert _changed(
        folder, lambda d: (d / "red/000.bmp").write_bytes((d / "red/001.bmp").read_bytes())
    )[0] == ["class red has other images"]


def test_a_list_of_another_moment_is_not_believed(folder):
    before = take(_open(folder))
    (folder / "train/red/001.png").unlink()
    later = listing(_open(folder))
    (folder / "train/red/002.png").unlink()
    source = _open(folder)
    assert differences(before, take(source), later, listing(source))[0] == (
        "class red has 2 images and had 4"
    )


def test_lists_are_kept(folder, tmp_path):
    listings = {"train": listing(_open(folder)), "eval": listing(_open(folder, "val"))}
    write_listings(tmp_path / "list", listings)
    assert read_listings(tmp_path / "list") == listings
    (tmp_path / "list").write_bytes(b"damaged")
    assert read_listings(tmp_path / "list") == {}
    assert read_listings(tmp_path / "none") == {}


def test_tfds_sets_are_their_version_and_files(data_dir, folder):
    train, test = (open_source("tfds:digits", split, data_dir) for split in ("train", "test"))
    found = take(train)
    assert found["set"] == "digits/1.0.0"
    assert found["count"] == 1437
    assert [name.partition(".")[0] for name in found["files"]] == ["digits-train"]
    assert take(open_source("tfds:digits:1.*.*", "train", data_dir)) == found
    part = take(open_source("tfds:digits", "train[:10%]", data_dir))
    assert differences(found, part, {}, {}) == ["there are 144 examples and were 1,437"]
    assert differences(found, take(test), {}, {})[:1] == [
        f"1 file removed: {next(iter(found['files']))}"
    ]
    other = {**found, "set": "digits/2.0.0"}
    assert found["files"].keys() == found["digests"].keys()
    assert differences(found, other, {}, {}) == ["it is digits/2.0.0 and was digits/1.0.0"]
    assert differences(found, take(_open(folder)), {}, {}) == [
        "it is of kind folder and was of kind tfds"
    ]


def test_a_tfds_set_rebuilt_with_other_contents_of_the_same_sizes_is_seen(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "tfds")
    before = take(open_source("tfds:digits", "train", data_dir))
    assert take(open_source("tfds:digits", "train", str(copy))) == before
    (file,) = copy.rglob("digits-train.*")
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    now = take(open_source("tfds:digits", "train", str(copy)))
    assert differences(before, now, {}, {}) == [f"1 file changed: {file.name}"]
    test = [take(open_source("tfds:digits", "test", str(place))) for place in (data_dir, copy)]
    assert test[0] == test[1]
    # Checkpoints from before there were digests do not show it, and are continued.
    old = {name: value for name, value in before.items() if name != "digests"}
    assert differences(old, now, {}, {}) == []
    other = {**old, "files": {file.name: 1}}
    assert differences(other, now, {}, {}) == [f"1 file changed: {file.name}"]


def test_arrays_have_their_number_and_classes():
    source = ArraySource(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, int), ["a", "b"])
    found = take(source)
    assert found.items() >= {"kind": "ArraySource", "count": 3}.items()
    assert found["class_names"] == ["a", "b"]
    other = ArraySource(source.images.copy(), source.labels, ["a", "b"])
    assert take(other) == found
    for array in (other.images, other.labels):
        array.flat[0] = 1
        assert differences(found, take(other), {}, {}) == ["its fingerprint differs"]
        array.flat[0] = 0


def test_in_another_order_classes_are_others():
    before = {"kind": "x", "count": 1, "class_names": ["a", "b"]}
    now = {**before, "class_names": ["b", "a"]}
    assert differences(before, now, {}, {}) == ["its classes are in another order"]


def test_images_in_another_order_by_another_unicode_form_are_noticed():
    """Names were sorted as they are, and are sorted as they are composed."""
    names = ["che\u0302ne", "chien"]
    old = {"kind": "folder", "count": 2, "classes": {name: [1, "a", "b"] for name in names}}
    now = {**old, "classes": {name: [1, "a", "b"] for name in ("chien", "ch\u00eane")}}
    now["class_names"] = ["ch\u00eane", "chien"]
    (said,) = differences({**old, "class_names": names}, now, {}, {})
    assert (
        said == "its images are in another order, as names of classes are in another Unicode form"
    )
    assert differences(now, now, {}, {}) == []

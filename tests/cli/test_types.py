"""Types of arguments."""

import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from resnet_flax.cli import types

INTEGERS = types.whole_number(1, 1000)
NUMBERS = types.number(0.0, 1e6)
LIST = types.whole_numbers(0, 9, "0,1,2")
CHANNELS = types.channel_numbers("0.5,0.4,0.3")
SCALES = types.channel_numbers("0.5,0.4,0.3", zero=False)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (INTEGERS, "1", 1),
        (INTEGERS, "1000", 1000),
        (NUMBERS, "0", 0.0),
        (NUMBERS, "2.5", 2.5),
        (NUMBERS, "1e6", 1e6),
        (LIST, "0", [0]),
        (LIST, "9, 1,9", [9, 1, 9]),
        (CHANNELS, "0.485,0.456,0", (0.485, 0.456, 0.0)),
        (SCALES, "-0.5", (-0.5,)),
        (types.data_source, "tfds:digits", "tfds:digits"),
        (types.data_source, "folder:a:b", "folder:a:b"),
        (types.tfds_source, "tfds:digits", "tfds:digits"),
    ],
)
def test_values_are_parsed(parse, text, value):
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("parse", "texts", "message"),
    [
        (
            INTEGERS,
            ("0", "1001", "2.5", "1e2", "many", "", "9" * 5000),
            "must be a whole number from 1 to 1000, not '{}'",
        ),
        (
            NUMBERS,
            ("-0.1", "1000001", "nan", "inf", "1e999", "many", ""),
            "must be a number from 0 to 1000000, not '{}'",
        ),
        (
            LIST,
            ("1,x", "1,", "", "10", "-1", "1.5", "1 2"),
            "must be whole numbers from 0 to 9 separated by commas, such as 0,1,2, not '{}'",
        ),
        (
            CHANNELS,
            ("a", "0.5,", "nan", "0.5,inf", ""),
            "must be one number, or one for each channel separated by commas, such as "
            "0.5,0.4,0.3, not '{}'",
        ),
        (
            SCALES,
            ("0", "0.5,0,0.5"),
            "must be one number other than 0, or one for each channel separated by commas, "
            "such as 0.5,0.4,0.3, not '{}'",
        ),
        (
            types.data_source,
            ("digits", "tfds:", "folder", "https://x", ""),
            "must be tfds:NAME or folder:DIR, such as tfds:cifar10, not '{}'",
        ),
        (
            types.tfds_source,
            ("digits", "tfds:", "folder:x"),
            "must be tfds:NAME, such as tfds:cifar10, not '{}'",
        ),
        (
            types.output_file(".png"),
            ("f.xyz", "png", "x.png/y", ""),
            "must be a file that ends in .png, not '{}'",
        ),
    ],
)
def test_what_is_none_is_told(parse, texts, message):
    for text in texts:
        with pytest.raises(ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == message.format(text)


def test_an_output_file_is_tried_and_nothing_is_left(tmp_path):
    new = tmp_path / "a/b/c.PNG"
    assert types.output_file(".png")(str(new)) == new
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old.json"
    old.write_text("[]")
    assert types.output_file()(str(old)) == old
    assert old.read_text() == "[]"
    (tmp_path / "directory").mkdir()
    assert types.output_file()(str(tmp_path / "directory/x.json")).name == "x.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "old.json"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("directory", "Is a directory"),
        ("file/x.json", "Not a directory"),
        ("file/x/y.json", "Not a directory"),
        ("directory/" + 300 * "x", "File name too long"),
        ("new/" + 300 * "x", "File name too long"),
        ("new/" + 252 * "x", "File name too long"),  # that of the file that then replaces it
    ],
)
def test_an_output_file_that_cannot_be_written_is_told(tmp_path, name, reason):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentTypeError) as error:
        types.output_file()(str(tmp_path / name))
    assert str(error.value) == (
        f"must be a file that can be written, not '{tmp_path / name}': {reason}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


@pytest.mark.parametrize("name", ["new/x.json", "old.json"])
def test_an_output_file_in_a_directory_of_another_is_told(tmp_path, name):
    (tmp_path / "old.json").write_text("[]")
    tmp_path.chmod(0o555)
    code = f"from resnet_flax.cli.types import *; output_file()('{tmp_path}/{name}')"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:  # root ignores permissions unless it drops that capability
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv writes everywhere")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr.endswith(f"/{name}': Permission denied\n")

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from resnet_flax.data.sources import in_memory, open_source
from resnet_flax.errors import UserError


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
        ("digits", "train", "data.source must be tfds:NAME"),
        ("tfds:", "train", "data.source must be tfds:NAME"),
        ("tfds:digit", "train", "no data set called 'digit'; did you mean digits"),
        ("tfds:../x", "train", "TFDS cannot make '../x' out: "),
        ("tfds:digits/2.0", "train", "TFDS cannot make 'digits/2.0' out: "),
        (
            "tfds:digits",
            "validation",
            r"no split 'validation', .* \(it has train, test\)",
        ),
        ("tfds:cifar10", "train", "not prepared in .*cifar10.*`tfds build cifar10"),
    ],
)
def test_bad_sources_are_explained(data_dir, name, split, message):
    with pytest.raises(UserError, match=message):
        open_source(name, split, data_dir)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot prepare digits in .*file.*Not a directory"):
        open_source("tfds:digits", "train", str(tmp_path / "file"))

import multiprocessing
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data.pipeline import eval_batches, train_batches
from resnet_flax.data.sources import ArraySource, open_source
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError


@pytest.fixture
def source():
    images = np.arange(50 * 4, dtype=np.uint8).reshape(50, 2, 2, 1)
    return ArraySource(images, np.arange(50), tuple(map(str, range(50))))


def _labels(source, n, **settings):
    with train_batches(source, **{"seed": 0, "batch_size": 8, **settings}) as batches:
        return np.stack([batch["label"] for batch in islice(batches, n)])


def test_batches_have_images_labels_and_mask(source):
    with train_batches(source, seed=0, batch_size=8) as batches:
        batch = next(batches)
    assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (8, 2, 2, 1))
    assert batch["label"].dtype == np.int32
    assert batch["mask"].all()
    np.testing.assert_array_equal(batch["image"], source.images[batch["label"]])


def test_every_epoch_holds_every_example_once_in_another_order(source):
    stream = _labels(source, 25).reshape(4, 50)
    for epoch in stream:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in stream}) == 4
    assert tuple(_labels(source, 25, seed=1)[0]) != tuple(stream[0][:8])


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_having_gone_there(source, workers):
    whole = _labels(source, 20)
    np.testing.assert_array_equal(_labels(source, 7, start=13, workers=workers), whole[13:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_shares_of_hosts_make_up_the_global_batches(source, hosts):
    shares = [_labels(source, 15, start=3, host=h, hosts=hosts) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), _labels(source, 18)[3:])


def test_starting_reads_nothing_that_comes_before(source):
    read = []

    class Watched(ArraySource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    watched = Watched(source.images, source.labels, source.class_names)
    _labels(watched, 1, start=1_000_000)
    assert len(read) <= 8 * 16  # the batch and what is read ahead


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_example_once(source, batch_size, hosts):
    batch_size *= hosts
    shares = []
    for host in range(hosts):
        with eval_batches(source, batch_size=batch_size, host=host, hosts=hosts) as batches:
            shares.append(list(batches))
    assert len({len(share) for share in shares}) == 1
    seen = []
    for parts in zip(*shares, strict=True):
        whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert len(whole["label"]) == batch_size
        seen += list(whole["label"][whole["mask"]])
    assert seen == list(range(50))


def test_bad_batch_sizes_are_explained(source):
    with (
        pytest.raises(UserError, match="batch_size=64 is more than the 50 training examples"),
        train_batches(source, seed=0, batch_size=64),
    ):
        pass
    with (
        pytest.raises(UserError, match="batch_size=9 must be a multiple of the 2 hosts"),
        train_batches(source, seed=0, batch_size=9, hosts=2),
    ):
        pass


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_thousand_batches_are_the_same_with_any_number_of_workers(source, workers):
    alone = _labels(source, 1000)
    np.testing.assert_array_equal(_labels(source, 1000, workers=workers), alone)


class Photographs(ArraySource):
    """Pictures of different sizes, made on demand."""

    def __getitem__(self, index):
        noise = np.random.default_rng(index).integers(0, 256, (20 + index % 7, 25, 3), np.uint8)
        return {"image": Image.fromarray(noise), "label": np.int32(index)}


PHOTOGRAPHS = Photographs(
    np.zeros((40, 1, 1, 1), np.uint8), np.arange(40), tuple(map(str, range(40)))
)
RANDOM = TrainTransform("random_resized", sizes=(12,), policy="trivialaugment")


def _images(n, **settings):
    settings = {"seed": 0, "batch_size": 8, "transform": RANDOM, **settings}
    with train_batches(PHOTOGRAPHS, **settings) as batches:
        return np.stack([batch["image"] for batch in islice(batches, n)])


def test_transforms_are_seeded_by_the_position_in_the_stream():
    whole = _images(12)
    assert whole.shape == (12, 8, 12, 12, 3)
    np.testing.assert_array_equal(_images(12), whole)
    np.testing.assert_array_equal(_images(4, start=8), whole[8:])
    np.testing.assert_array_equal(_images(4, start=8, workers=2), whole[8:])
    shares = [_images(12, host=host, hosts=2) for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    np.testing.assert_array_equal(_images(6, batch_size=16).reshape(whole.shape), whole)
    assert (_images(1, seed=1) != whole[:1]).any()
    # The same examples come in the second epoch, but not the same crops.
    labels = _labels(PHOTOGRAPHS, 10, transform=RANDOM).reshape(2, 40)
    first, second = whole.reshape(96, 12, 12, 3)[:40], whole.reshape(96, 12, 12, 3)[40:80]
    for label in range(40):
        one, other = first[labels[0] == label], second[labels[1] == label]
        assert (one != other).any()


def test_repeated_examples_are_augmented_each_time():
    with train_batches(PHOTOGRAPHS, seed=0, batch_size=9, transform=RANDOM, repeats=3) as batches:
        batch = next(batches)
    labels = batch["label"].reshape(3, 3)
    assert (labels == labels[:, :1]).all()
    assert len(set(labels[:, 0])) == 3
    images = batch["image"].reshape(3, 3, -1)
    assert (images[:, 0] != images[:, 1]).any(-1).all()


def test_evaluation_transforms_every_image():
    with eval_batches(PHOTOGRAPHS, batch_size=16, transform=EvalTransform(16)) as batches:
        found = list(batches)
    assert [batch["image"].shape for batch in found] == [(16, 16, 16, 3)] * 3
    expected = EvalTransform(16)(PHOTOGRAPHS[33]["image"])
    np.testing.assert_array_equal(found[2]["image"][1], expected)


def test_images_that_are_not_of_one_size_are_explained():
    with (
        pytest.raises(UserError, match=r"have different sizes .*20, 25, 3.*; set data.size"),
        eval_batches(PHOTOGRAPHS, batch_size=16) as batches,
    ):
        list(batches)


def test_an_image_that_cannot_be_decoded_is_named_from_a_worker_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.png").write_bytes(b"no image")
    broken = open_source(f"folder:{tmp_path}", "train")
    for workers in (0, 1):
        with (
            pytest.raises(Exception, match=r"train/[ab]/x.png cannot be decoded"),
            train_batches(broken, seed=0, batch_size=2, workers=workers) as batches,
        ):
            next(batches)


def test_no_process_is_left_behind(source):
    with train_batches(source, seed=0, batch_size=8, workers=2) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) >= 2
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()

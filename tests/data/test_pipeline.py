from itertools import islice

import numpy as np
import pytest

from resnet_flax.data.pipeline import eval_batches, train_batches
from resnet_flax.data.sources import ArraySource
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
    np.testing.assert_array_equal(batch["image"], source._images[batch["label"]])


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

    watched = Watched(source._images, source._labels, source.class_names)
    _labels(watched, 1, start=1_000_000)
    assert len(read) <= 8 * 16  # the batch and what is read ahead


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_example_once(source, batch_size, hosts):
    batch_size *= hosts
    shares = [
        list(eval_batches(source, batch_size=batch_size, host=h, hosts=hosts)) for h in range(hosts)
    ]
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

"""Parts of batches of several processes, in one."""

import numpy as np
import pytest
from photographs import folder_run

from resnet_flax.apply.experiment import make_run
from resnet_flax.data.parts import Parts
from resnet_flax.data.pipeline import EvalShares, TrainShares, blank_batch, shapes_of
from resnet_flax.data.sampler import Sampler
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed
from resnet_flax.training.parts import CommonError, complete_batches


class Several:
    """Examples with several correct labels, one of which cannot be read."""

    class_names = ("a", "b")

    def __init__(self, broken=-1, large=()):
        self._broken, self._large = broken, large

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self._broken:
            raise UserError(f"image {index} is damaged")
        side = 6 if index in self._large else 5
        image = np.full((side, side, 3), index, np.uint8)
        return {"image": image, "label": index % 2, "valid_labels": np.ones(2, bool)}


def _blank(number):
    del number
    return blank_batch({"image": (5, 5, 3), "valid_labels": (2,)}, 2)


def _read(source):
    shares = EvalShares(source, EvalTransform(), batch_size=2, host=0, hosts=1)
    return (shares[i] for i in range(len(shares)))


@pytest.fixture
def two(monkeypatch):
    """As if there were two processes; returns what the other one says of its parts."""
    other = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(distributed, "all_max", lambda mine: max(mine, *other))
    return other


@pytest.mark.parametrize("broken", [0, 5])
def test_from_the_part_that_cannot_be_read_all_are_blank(broken):
    iterator = Parts(_read(Several(broken)), _blank)
    found = [next(iterator) for _ in range(6)]
    assert [batch["mask"].all() for batch in found] == [i < broken // 2 for i in range(6)]
    assert str(iterator.error) == f"image {broken} is damaged"


def test_a_part_of_another_size_is_not_fed_to_the_others():
    iterator = Parts(_read(Several(large=(4, 5))), _blank)
    assert [next(iterator)["mask"].all() for _ in range(4)] == [True, True, False, False]
    assert "the images have shape [6, 6, 3] (height, width, channels), others [5, 5, 3]" in str(
        iterator.error
    )


@pytest.mark.parametrize("broken", [-1, 4])
@pytest.mark.parametrize("other", [0, 1])
def test_all_take_every_batch_and_then_agree(two, broken, other):
    two.append(other)
    taken = []
    batches = complete_batches(_read(Several(broken)), 6, _blank, "the evaluation", 7)
    expected = {
        (-1, 1): "another process could not read its part of the evaluation; see its error",
        (4, 0): "image 4 is damaged",
        (4, 1): "image 4 is damaged",
    }.get((broken, other))
    if expected is None:
        taken += batches
    else:
        with pytest.raises(CommonError) as raised:
            taken.extend(batches)
        assert str(raised.value.error) == expected
        assert raised.value.step == 7
    assert len(taken) == 6
    assert len({batch["image"].shape for batch in taken}) == 1


def test_one_process_alone_fails_at_once():
    batches = complete_batches(_read(Several(4)), 6, _blank, "the evaluation", 7)
    with pytest.raises(UserError, match="image 4 is damaged"):
        list(batches)


def _same_form(blank, batch):
    form = [{k: (v.shape, v.dtype) for k, v in one.items()} for one in (blank, batch)]
    assert form[0] == form[1]
    assert not blank["mask"].any()


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("crop", ["none", "random_resized"])
def test_a_blank_part_has_the_form_of_one_that_was_read(step, crop):
    sizes = (4, 8) if crop != "none" else ()
    transform = TrainTransform(crop, sizes, boundaries=(2,))
    shares = TrainShares(Several(), Sampler(12, 0), transform, 4, 0, 2, step)
    shapes = shapes_of(Several()[0], np.asarray(Several()[0]["image"]))
    image = transform.shape(shapes["image"], step)
    _same_form(blank_batch({**shapes, "image": image}, 2), shares[0])


def test_a_run_knows_the_form_of_its_batches(tmp_path):
    from photographs import make_folder

    config = folder_run(make_folder(tmp_path / "images", train=4, val=4, size=9))
    config.data.size, config.data.crop, config.data.eval_size = 6, "random_resized", 8
    config.data.early_sizes, config.data.early_steps = (4,), (5,)
    run = make_run(config)
    for step in (0, 5):
        with run.train_batches(step) as batches:
            _same_form(run.blank_train_batch(step), next(batches))
    with run.eval_batches() as batches:
        _same_form(run.blank_eval_batch(), next(batches))

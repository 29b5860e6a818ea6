import numpy as np
import pytest

from resnet_flax.data.sampler import Sampler, permutation


def test_the_order_is_fixed_for_good():
    # Fixed numbers: with another order, continued runs would not reproduce uninterrupted ones.
    np.testing.assert_array_equal(permutation(10, 0, 0), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7])
    np.testing.assert_array_equal(Sampler(10, 3).examples(7, 6), [4, 3, 0, 9, 7, 8])


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_every_epoch_is_a_permutation_of_its_own(size):
    epochs = Sampler(size, 1).examples(0, 4 * size).reshape(4, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 1:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert (permutation(size, 0, 0) != permutation(size, 1, 0)).any()


def test_any_stretch_is_cut_from_the_same_stream():
    whole = Sampler(11, 5).examples(0, 100)
    for first, count in ((0, 1), (3, 40), (10, 2), (99, 1), (11, 0)):
        np.testing.assert_array_equal(
            Sampler(11, 5).examples(first, count), whole[first : first + count]
        )


def test_first_and_last_places_are_uniform():
    # Chi-squared of 2000 permutations of 8 with 7 degrees of freedom; 24.3 is its 99.9 % quantile.
    drawn = np.array([permutation(8, seed, 3) for seed in range(2000)])
    for place in (0, 3, 7):
        counts = np.bincount(drawn[:, place], minlength=8)
        assert ((counts - 250) ** 2 / 250).sum() < 24.3


def test_repeats_stand_in_a_row():
    plain, thrice = Sampler(9, 2), Sampler(9, 2, repeats=3)
    np.testing.assert_array_equal(thrice.examples(4, 20), np.repeat(plain.examples(0, 9), 3)[4:24])

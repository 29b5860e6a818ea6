from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.data.augment import (
    COLOUR_COMPONENTS,
    COLOUR_EIGENVALUES,
    crop_and_flip,
    erase,
    mix,
    pca_lighting,
)


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3)), jnp.uint8)


def _augment(images, step, pad=2, flip=True, seed=0):
    return np.asarray(crop_and_flip(images, jnp.int32(step), seed=seed, pad=pad, flip=flip))


def test_nothing_asked_nothing_done(images):
    np.testing.assert_array_equal(_augment(images, 3, 0, False), images)


def test_every_result_is_a_crop_of_the_padded_image_or_of_its_mirror(images):
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for i, result in enumerate(_augment(images, 0)):
        found = [
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if (result == padded[i, dy : dy + 6, dx : dx + 5][:, :: -1 if mirrored else 1]).all()
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {dy for dy, _, _ in seen} == set(range(5))
    assert {dx for _, dx, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_half_are_mirrored_wherever_they_are_cropped():
    # Every pixel encodes its row and column, so a crop shows its corner and whether it is flipped.
    y, x = np.mgrid[1:7, 1:6]
    image = jnp.asarray(np.stack([y, x, x * 0 + 1], -1), jnp.uint8)
    result = _augment(jnp.broadcast_to(image, (4000, 6, 5, 3)), 0, pad=1).astype(int)
    mirrored = result[:, 3, 1, 1] > result[:, 3, 3, 1]
    top, left = 3 - (result[:, 3, 2, 0] - 1), 2 - (result[:, 3, 2, 1] - 1)
    assert 0.475 < mirrored.mean() < 0.525  # three standard deviations
    for corner in (top, left):
        for place in (-1, 0, 1):
            at = corner == place
            assert 0.31 < at.mean() < 0.357
            assert 0.45 < mirrored[at].mean() < 0.55
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


def test_an_example_depends_on_its_position_in_the_stream_alone(images):
    # Batch 1 of 32 is the second half of batch 0 of 64.
    np.testing.assert_array_equal(_augment(images[32:], 1), _augment(images, 0)[32:])


def test_steps_and_seeds_differ(images):
    first = _augment(images, 0)
    assert (_augment(images, 1) != first).any()
    assert (_augment(images, 0, seed=1) != first).any()


def test_sharded_is_the_same(images):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    sharded = jax.jit(lambda x: crop_and_flip(x, jnp.int32(7), seed=0, pad=2, flip=True))(
        jax.device_put(images, cut)
    )
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, _augment(images, 7))


def _x(b=8, side=20):
    return jnp.asarray(np.random.default_rng(1).normal(size=(b, side, side, 3)) + 5, jnp.float32)


def test_pca_lighting_shifts_along_the_components_of_color():
    x = _x(2000, 2)
    shift = pca_lighting(x, jnp.int32(0), seed=0, alpha_std=0.1, std=(0.5, 0.25, 0.2)) - x
    # One shift for all pixels of an image.
    assert np.abs(shift - shift[:, :1, :1]).max() < 1e-5
    of_pixels = np.asarray(shift[:, 0, 0]) * (0.5, 0.25, 0.2)
    components = np.array(COLOUR_COMPONENTS)
    expected = components @ np.diag(np.square(np.multiply(COLOUR_EIGENVALUES, 0.1))) @ components.T
    assert np.abs(np.cov(of_pixels.T) - expected).max() < 0.1 * expected.max()
    assert np.abs(of_pixels.mean(0)).max() < 0.002


def test_colour_components_are_orthonormal():
    product = np.array(COLOUR_COMPONENTS).T @ np.array(COLOUR_COMPONENTS)
    np.testing.assert_allclose(product, np.eye(3), atol=2e-4)


def test_erased_rectangles_are_of_the_sizes_of_the_paper():
    x = _x(600, 40)
    erased = np.asarray(erase(x, jnp.int32(0), seed=0, probability=0.5)) == 0
    assert (erased.all(-1) == erased.any(-1)).all()
    which = erased.any((1, 2, 3))
    assert 0.43 < which.mean() < 0.57
    areas, ratios, places = [], [], []
    for image in erased[which][..., 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert image.sum() == height * width
        areas.append(height * width / 1600)
        ratios.append(height / width)
        places.append((rows[0] / (40 - height + 1), columns[0] / (40 - width + 1)))
    assert 0.015 < min(areas) < 0.04
    assert 0.28 < max(areas) < 0.36
    # Log-uniform: as many tall rectangles as wide ones, a quarter beyond 1.82.
    assert 0.42 < np.mean(np.log(ratios) > 0) < 0.58
    assert 0.17 < np.mean(np.array(ratios) > 3.3**0.5) < 0.33
    assert np.abs(np.mean(places, 0) - 0.48).max() < 0.06
    assert erased[which][:, 0].any()
    assert erased[which][:, -1].any()
    everyone = np.asarray(erase(x, jnp.int32(0), seed=0, probability=1.0)) == 0
    assert everyone.any((1, 2, 3)).all()


@partial(jax.jit, static_argnames=("seed", "mixup", "cutmix"))
def _mix(x, step, seed=0, mixup=0.0, cutmix=0.0):
    targets = jnp.eye(len(x))
    return mix(x, targets, jnp.int32(step), seed=seed, mixup=mixup, cutmix=cutmix)


def test_mixup_blends_neighbours_and_targets_alike():
    x = _x()
    shares = []
    for step in range(60):
        mixed, targets = _mix(x, step, mixup=0.2)
        share = float(targets[0, 0])
        shares.append(share)
        blended = share * np.eye(8) + (1 - share) * np.roll(np.eye(8), 1, 0)
        np.testing.assert_allclose(targets, blended, atol=1e-6)
        np.testing.assert_allclose(mixed, share * x + (1 - share) * np.roll(x, 1, 0), atol=1e-4)
    # About two thirds of beta(0.2, 0.2) are within 0.1 of the ends.
    ends = np.minimum(shares, np.subtract(1, shares)) < 0.1
    assert 0.45 < ends.mean() < 0.9
    assert len(set(shares)) == 60


def test_cutmix_pastes_a_rectangle_and_weighs_the_targets_by_its_area():
    x = _x()
    shares = []
    for step in range(40):
        mixed, targets = _mix(x, step, cutmix=1.0)
        pasted = np.asarray(mixed == jnp.roll(x, 1, 0)).all(-1)
        kept = np.asarray(mixed == x).all(-1)
        assert (pasted ^ kept).all()
        assert (pasted == pasted[:1]).all()
        share = float(targets[0, 0])
        np.testing.assert_allclose(share, 1 - pasted[0].mean(), atol=1e-5)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        np.testing.assert_array_equal(pasted[0], rows[:, None] & columns)
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
        shares.append(share)
    assert min(shares) < 0.35
    assert max(shares) > 0.9


def test_the_rectangle_has_the_share_that_was_drawn():
    # If it is not clipped, both sides are the root of 1 - weight (Yun et al. 2019, eq. 1), with a
    # uniform weight from beta(1, 1), so sides are distributed like the root.
    x, sides = _x(2, 100), []
    for step in range(400):
        mixed, _ = _mix(x, step, cutmix=1.0)
        pasted = np.asarray(mixed == jnp.roll(x, 1, 0)).all(-1)[0]
        rows = np.flatnonzero(pasted.any(1))
        if len(rows) and rows[0] > 0 and rows[-1] < 99:
            sides.append(len(rows) / 100)
    # P(side > 1/2) would be 3/4 without clipping: side s stays inside with probability 1 - s.
    weights = np.linspace(0, 1, 1001)
    inside = 2 * weights * (1 - weights)
    expected = inside[weights > 0.5].sum() / inside.sum()
    assert abs(np.mean(np.array(sides) > 0.5) - expected) < 4 * np.sqrt(0.25 / len(sides))


def test_repeated_images_mix_with_other_ones():
    targets = jnp.repeat(jnp.eye(3), 4, axis=0)
    for kind in ({"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
        _, mixed = mix(_x(12), targets, jnp.int32(1), seed=0, distance=4, **kind)
        assert (np.count_nonzero(mixed, axis=1) == 2).all()


def test_either_is_drawn_where_both_are_asked_for():
    x = _x()
    cut = [bool((_mix(x, s, mixup=1.0, cutmix=1.0)[0] == x).all(-1).any()) for s in range(60)]
    assert 15 < sum(cut) < 45


def test_randomness_of_each_kind_is_of_seed_and_position():
    x = _x(16)
    for kind in (
        lambda x, step, seed: erase(x, step, seed=seed, probability=1.0),
        lambda x, step, seed: pca_lighting(x, step, seed=seed, alpha_std=0.1, std=(1.0,)),
    ):
        whole = kind(x, jnp.int32(0), 0)
        np.testing.assert_array_equal(kind(x[8:], jnp.int32(1), 0), whole[8:])
        assert (kind(x, jnp.int32(0), 1) != whole).any()
        assert (kind(x, jnp.int32(1), 0) != whole).any()
    assert (_mix(x, 0, mixup=1.0)[0] != _mix(x, 0, mixup=1.0, seed=1)[0]).any()

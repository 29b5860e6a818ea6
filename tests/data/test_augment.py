import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.data.augment import augment, normalize


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3)), jnp.uint8)


def _augment(images, step, pad=2, flip=True, seed=0):
    return np.asarray(augment(images, jnp.int32(step), seed=seed, pad=pad, flip=flip))


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
    sharded = jax.jit(lambda x: augment(x, jnp.int32(7), seed=0, pad=2, flip=True))(
        jax.device_put(images, cut)
    )
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, _augment(images, 7))


def test_normalize(images):
    x = normalize(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), jnp.float32)
    expected = (np.asarray(images) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    assert normalize(images, (0.5,), (0.2,), jnp.bfloat16).dtype == jnp.bfloat16

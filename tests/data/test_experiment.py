"""From a config's `data` to splits and transforms."""

import jax.numpy as jnp
import numpy as np

from resnet_flax.apply.tables import default_config
from resnet_flax.data.experiment import (
    augment_and_normalize,
    make_preprocessing,
    make_transforms,
)
from resnet_flax.data.preprocessing import Preprocessing


def test_transforms_are_what_the_config_says():
    data = default_config().data
    data.update(
        crop="random_resized",
        size=48,
        early_sizes=(16, 32),
        early_steps=(5, 9),
        jitter=(60, 70),
        crop_area=(0.2, 0.9),
        crop_ratio=(0.5, 2.0),
        policy="randaugment",
        policy_operations=3,
        policy_magnitude=7,
        interpolation="bicubic",
        crop_fraction=0.75,
        eval_size=64,
    )
    train, evaluation = make_transforms(data)
    assert (train.crop, train.sizes, train.boundaries) == ("random_resized", (16, 32, 48), (5, 9))
    assert (train.jitter, train.crop_area) == ((60, 70), (0.2, 0.9))
    assert (train.crop_ratio, train.policy) == ((0.5, 2.0), "randaugment")
    assert (train.operations, train.magnitude, train.interpolation) == (3, 7, "bicubic")
    assert (evaluation.size, evaluation.crop_fraction) == (64, 0.75)
    assert evaluation.interpolation == "bicubic"
    data.eval_size = 0
    assert make_transforms(data)[1].size == 48


def test_images_are_normalised_alike_in_training_and_evaluation():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, 4, 4, 3)), jnp.uint8)
    mean = rng.uniform(100, 140, (4, 4, 3)).round(2).astype(np.float32)
    data = default_config().data
    data.update(pad=0, flip=False, std=(0.2, 0.25, 0.3))
    for pixel_mean, channels in ((mean, (0.0,)), (None, (0.5, 0.4, 0.3))):
        data.mean = channels
        preprocessing = make_preprocessing(data, pixel_mean)
        levels = np.asarray(images) - (0 if pixel_mean is None else pixel_mean)
        expected = (levels / 255 - channels) / (0.2, 0.25, 0.3)
        x = preprocessing.normalize(images)
        np.testing.assert_allclose(x, expected, atol=1e-5)
        trained, labels = augment_and_normalize(
            images,
            jnp.arange(2),
            jnp.int32(0),
            data=data,
            preprocessing=preprocessing,
            seed=0,
            classes=10,
            dtype=jnp.float32,
        )
        np.testing.assert_array_equal(trained, x)
        np.testing.assert_array_equal(labels, [0, 1])


def test_the_mean_image_is_subtracted_before_padding():
    images = jnp.full((8, 4, 4, 3), 100, jnp.uint8)
    data = default_config().data
    data.update(pad=4, flip=False, std=(0.5,))
    x, _ = augment_and_normalize(
        images,
        jnp.arange(8),
        jnp.int32(3),
        data=data,
        preprocessing=make_preprocessing(data, np.arange(48.0).reshape(4, 4, 3)),
        seed=0,
        classes=10,
        dtype=jnp.float32,
    )
    levels = set(np.round(np.unique(x) * 255 * 0.5, 3))
    # The crop pads with the mean, 0; and the scale is that of pixels in [0, 1].
    assert {0.0} < levels <= {0.0, *map(float, range(53, 101))}


def test_preprocessing_is_what_the_config_says():
    data = default_config().data
    data.update(size=48, crop_fraction=0.75, interpolation="bicubic", mean=(0.5,), std=(0.2,))
    assert make_preprocessing(data) == Preprocessing(48, 0.75, "bicubic", (0.5,), (0.2,))
    data.eval_size = 64
    # As float32 has it, 100.13 is 100.12999725341797.
    mean_image = np.full((1, 1, 2), 100.13, np.float32)
    preprocessing = make_preprocessing(data, mean_image)
    assert (preprocessing.size, preprocessing.pixel_mean) == (64, ([[100.13, 100.13]],))
    levels = preprocessing.subtract_mean_image(jnp.zeros((1, 1, 1, 2), jnp.uint8))
    np.testing.assert_array_equal(levels[0], -mean_image)

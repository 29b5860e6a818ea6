"""Preprocessing, and its form in checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.data import ArraySource, mean_image
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.transforms import EvalTransform


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)), jnp.uint8)


def test_pixels_become_normalised_numbers(images):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = Preprocessing(mean=mean, std=std).normalize(images)
    np.testing.assert_allclose(x, (np.asarray(images) / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    half = Preprocessing(mean=(0.5,), std=(0.2,)).normalize(images, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16


def test_the_mean_image_is_subtracted_first(images):
    mean_image = np.arange(192.0).reshape(8, 8, 3)
    preprocessing = Preprocessing(0, mean=(0.0,), std=(0.5,), pixel_mean=tuple(mean_image.tolist()))
    levels = preprocessing.subtract_mean_image(images)
    np.testing.assert_array_equal(levels, np.asarray(images) - mean_image)
    x = preprocessing.normalize(images)
    np.testing.assert_array_equal(x, preprocessing.standardize(levels, jnp.float32))
    np.testing.assert_allclose(x, np.asarray(levels) / 255 / 0.5, rtol=1e-6)
    assert Preprocessing().subtract_mean_image(images) is images


@pytest.mark.parametrize("pixel_mean", [(), ([[1.5, 2.0]],)])
def test_checkpoints_give_it_back(pixel_mean):
    preprocessing = Preprocessing(
        96, 0.9, "bicubic", (0.1, 0.2), (0.4, 0.5), pixel_mean, "on", "white", 3
    )
    written = json.loads(json.dumps(preprocessing.to_json()))
    assert written.keys() == {
        *("size", "crop_fraction", "interpolation", "mean", "std", "pixel_mean"),
        *("exif", "alpha", "channels"),
    }
    assert Preprocessing.from_json(written) == preprocessing
    # As checkpoints had it up to version 0.1.
    assert Preprocessing.from_json({"image_shape": [96, 96, 2], **written}) == preprocessing


def test_the_mean_image_depends_on_the_images_alone(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    source = ArraySource(pixels, np.zeros(50, np.int64), ("a",))
    transform = EvalTransform()
    whole = mean_image.pixel_mean(source, transform, (4, 4, 3))
    np.testing.assert_allclose(whole, pixels.mean(0), atol=0.006)  # rounded to two digits
    monkeypatch.setattr(mean_image, "WHOLE", pixels.size - 1)
    monkeypatch.setattr(mean_image, "SAMPLE", 3)
    sampled = mean_image.pixel_mean(source, transform, (4, 4, 3))
    np.testing.assert_allclose(sampled, pixels[[0, 24, 49]].mean(0), atol=0.006)

"""Resizing and cropping, also of thin images that would become enormous."""

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import resizing
from resnet_flax.data.resizing import center_box, resized_crops, shorter_size
from resnet_flax.data.transforms import EvalTransform, ScaleTransform, TenCropTransform, jitter_crop


def _noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((60, 40), 20, (30, 20)), ((40, 61), 20, (20, 30)), ((40, 40), 20, (20, 20))],
)
def test_the_shorter_side_is_resized_to(size, side, expected):
    assert shorter_size(size, side) == expected


def test_the_center_is_cropped():
    image = _noise(40, 60, 3)
    for side, (top, left) in ((20, (10, 20)), (37, (2, 12))):
        # Half of an odd margin is rounded to even, as in torchvision.
        box = center_box((60, 40), (side, side))
        crop = resized_crops(Image.fromarray(image), (60, 40), [box], Image.Resampling.BILINEAR)[0]
        np.testing.assert_array_equal(crop, image[top : top + side, left : left + side])


TRANSFORMS = (
    EvalTransform(28, 0.875),
    EvalTransform(28, 0.875, "bicubic"),
    TenCropTransform(28, 32),
    ScaleTransform(32, 8, 5, "bicubic"),
    lambda image: np.asarray(
        jitter_crop(
            Image.fromarray(image), np.random.default_rng(1), 28, (32, 32), Image.Resampling.BICUBIC
        )
    ),
)


@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 1, 3), (2, 500, 3), (700, 4, 3), (300, 1, 4)])
def test_crops_of_thin_images_are_those_of_the_complete_resized_image(monkeypatch, shape):
    image = _noise(*shape)
    expected = [transform(image) for transform in TRANSFORMS]
    monkeypatch.setattr(resizing, "WHOLE", 0)
    for transform, complete in zip(TRANSFORMS, expected, strict=True):
        np.testing.assert_array_equal(transform(image), complete)


@pytest.mark.parametrize("shape", [(3, 700, 3), (500, 7, 3), (5, 900, 1), (37, 41, 3)])
def test_where_positions_are_rounded_levels_differ_by_one_at_most(monkeypatch, shape):
    image = _noise(*shape)
    expected = [transform(image).astype(int) for transform in TRANSFORMS[:4]]
    monkeypatch.setattr(resizing, "WHOLE", 0)
    for transform, complete in zip(TRANSFORMS, expected, strict=False):
        distance = np.abs(transform(image) - complete)
        assert distance.max() <= 1
        assert (distance > 0).mean() < 0.01


def test_a_thin_image_takes_little_memory():
    strip = Image.fromarray(_noise(20_000, 1, 3))
    sizes = []
    resize = Image.Image.resize

    def noted(self, size, *settings, **more):
        sizes.append(size)
        return resize(self, size, *settings, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", noted)
        assert EvalTransform(224)(strip).shape == (224, 224, 3)
    assert sizes == [(224, 224)]  # not (256, 5120000)

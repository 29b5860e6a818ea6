"""Batches in a notebook's cell."""

import io

import numpy as np
from PIL import Image

import resnet_flax


def test_a_loop_over_a_split(data_dir):
    batches = resnet_flax.data.batches("tfds:digits", "test", batch_size=50, data_dir=data_dir)
    found = [(batch["image"], batch["label"][batch["mask"]]) for batch in batches]
    assert len(found) == len(batches) == 8
    assert found[0][0].shape == (50, 8, 8, 1)
    assert sum(len(labels) for _, labels in found) == 360
    assert batches.class_names == tuple("0123456789")
    assert repr(batches) == (
        "8 batches of 50, 360 images, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )
    again = [batch["label"] for batch in batches]
    np.testing.assert_array_equal(again[0], found[0][1])


def test_shuffled_epochs_of_arrays_in_memory():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(3, -1)
    source = resnet_flax.data.ArraySource(images, np.arange(40) % 2, ("even", "odd"))
    batches = resnet_flax.data.batches(source, batch_size=8, shuffle=True, epochs=2)
    pixels = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).reshape(2, 40)
    assert len(batches) == 10
    assert (np.sort(pixels) == np.arange(40)).all()
    assert (pixels[0] != pixels[1]).any()


def test_a_grid_of_images_with_the_names_of_their_classes(data_dir):
    batches = resnet_flax.data.batches("tfds:digits", data_dir=data_dir)
    png = Image.open(io.BytesIO(batches._repr_png_()))
    assert png.size[0] == 1200
    shown = np.asarray(png.convert("RGB"))
    assert shown.std() > 30
    titled = resnet_flax.data.grid(np.full((3, 8, 8, 3), 255, np.uint8), ["one", "two", "three"])
    bare = resnet_flax.data.grid(np.full((3, 8, 8, 3), 255, np.uint8))
    assert np.asarray(titled).min() < 100
    assert np.asarray(bare).min() == 255

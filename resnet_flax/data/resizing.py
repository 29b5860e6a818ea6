"""Resizing and cropping on the host, with Pillow."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data.pixels import to_array, to_image

# Pixels of a resized image up to which all of it is made before it is cropped: 268 MB of RGB.
WHOLE = 2**26

Box = tuple[int, int, int, int]  # left, top, right, bottom


def shorter_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size whose shorter side is `side` pixels; the longer one is rounded down."""
    width, height = size
    if width <= height:
        return side, max(1, side * height // width)
    return max(1, side * width // height), side


def center_box(size: tuple[int, int], crop: tuple[int, int]) -> Box:
    """The box of width and height `crop` in the middle, which may reach beyond the image."""
    left, top = (round((of - part) / 2) for of, part in zip(size, crop, strict=True))
    return left, top, left + crop[0], top + crop[1]


def resized_crops(
    image: Image.Image, size: tuple[int, int], boxes: Sequence[Box], resample: Image.Resampling
) -> list[Image.Image]:
    """Crops of an image that is resized to `size`; what is beyond it is black.

    A thin image that would become one of more than `WHOLE` pixels is cropped first, with a margin
    for the filter: its crops are those of the complete resized image up to the rounding of levels.
    """
    if math.prod(size) <= WHOLE:
        resized = image if size == image.size else image.resize(size, resample)
        return [resized.crop(box) for box in boxes]
    return [_part(image, size, box, resample) for box in boxes]


def crops(
    image: Any,
    shorter: int,
    boxes: Callable[[tuple[int, int]], list[Box]],
    resample: Image.Resampling,
) -> list[np.ndarray]:
    """Crops of an image whose shorter side is resized, as arrays; `boxes` are by its size then."""
    image = to_image(image)
    size = shorter_size(image.size, shorter)
    return [to_array(crop) for crop in resized_crops(image, size, boxes(size), resample)]


def _part(
    image: Image.Image, size: tuple[int, int], box: Box, resample: Image.Resampling
) -> Image.Image:
    """One of `resized_crops`, from the part of the image that it depends on."""
    inner = tuple(min(max(place, 0), size[i % 2]) for i, place in enumerate(box))
    part, places = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]
    for low, high in ((0, 2), (1, 3)):
        # Exact up to the division, as Pillow takes single precision: so relative to the part.
        scale = image.size[low], size[low]
        margin = 3 + 2 * -(-scale[0] // scale[1])  # bicubic reaches 2 pixels of the larger grid
        part[low] = max(0, inner[low] * scale[0] // scale[1] - margin)
        part[high] = min(scale[0], -(-inner[high] * scale[0] // scale[1]) + margin)
        for i in (low, high):
            places[i] = (inner[i] * scale[0] - part[low] * scale[1]) / scale[1]
    inner_size = inner[2] - inner[0], inner[3] - inner[1]
    found = image.crop(tuple(part)).resize(inner_size, resample, box=tuple(places))  # type: ignore[arg-type]
    return found.crop(tuple(b - inner[i % 2] for i, b in enumerate(box)))  # type: ignore[arg-type]

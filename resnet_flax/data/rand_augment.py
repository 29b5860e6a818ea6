"""RandAugment (Cubuk et al. 2020) and TrivialAugment (Mueller and Hutter 2021) on the host."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Magnitudes have 31 bins, 0 to 30, as in both papers' code. The tables give each operation's value
# at the last bin, and whether it is negated half of the time.
BINS = 31
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
# RandAugment translates by a fraction of the side, TrivialAugment by pixels.
RAND = {
    "identity": (0.0, False),
    "shear_x": (0.3, True),
    "shear_y": (0.3, True),
    "translate_x": (150 / 331, True),
    "translate_y": (150 / 331, True),
    "rotate": (30.0, True),
    **dict.fromkeys(_ENHANCERS, (0.9, True)),
    "posterize": (4.0, False),
    "solarize": (255.0, False),
    "autocontrast": (0.0, False),
    "equalize": (0.0, False),
}
WIDE = RAND | {
    "shear_x": (0.99, True),
    "shear_y": (0.99, True),
    "translate_x": (32.0, True),
    "translate_y": (32.0, True),
    "rotate": (135.0, True),
    **dict.fromkeys(_ENHANCERS, (0.99, True)),
    "posterize": (6.0, False),
}


def rand_augment(
    image: Image.Image, rng: np.random.Generator, operations: int, magnitude: int
) -> Image.Image:
    """Applies random operations one after another, all with the same magnitude (Cubuk et al. 2020).

    Args:
      image: with 8 bits per channel.
      rng: random generator.
      operations: how many; 2 is usual.
      magnitude: bin from 0 to 30; 9 is usual.
    """
    for _ in range(operations):
        name = list(RAND)[rng.integers(len(RAND))]
        value, signed = RAND[name]
        value *= magnitude / (BINS - 1)
        if name.startswith("translate"):
            value *= image.size[name == "translate_y"]
        image = operate(image, name, -value if signed and rng.random() < 0.5 else value)
    return image


def trivial_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies one operation; it and its magnitude are drawn uniformly.

    Mueller and Hutter 2021, "wide".
    """
    name = list(WIDE)[rng.integers(len(WIDE))]
    value, signed = WIDE[name]
    value *= int(rng.integers(BINS)) / (BINS - 1)
    return operate(image, name, -value if signed and rng.random() < 0.5 else value)


def operate(image: Image.Image, name: str, value: float) -> Image.Image:
    """Applies one operation.

    Args:
      image: with 8 bits per channel.
      name: a key of `RAND`.
      value: shears as a tangent, translations in pixels, rotations in degrees counterclockwise,
        enhancement factors minus 1, `posterize` in bits dropped, `solarize` in levels below 255.
    """
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(1 + value)
    match name:
        case "identity":
            return image
        case "shear_x":
            return _affine(image, (1, value, 0, 0, 1, 0))
        case "shear_y":
            return _affine(image, (1, 0, 0, value, 1, 0))
        case "translate_x":
            return _affine(image, (1, 0, -int(value), 0, 1, 0))
        case "translate_y":
            return _affine(image, (1, 0, 0, 0, 1, -int(value)))
        case "rotate":
            return image.rotate(value, Image.Resampling.BILINEAR)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(value))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(255 - value))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    raise ValueError(name)


def _affine(image: Image.Image, inverse: tuple[Any, ...]) -> Image.Image:
    """The image at `inverse` of each position, black beyond its edges."""
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)

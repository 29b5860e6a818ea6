"""Transforms on the host, with Pillow: crops, resizing and RandAugment.

Each begins with `pixels.Pixels`, so that an image is turned upright before it is cropped.
"""

import dataclasses
import math
from bisect import bisect_right
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data.pixels import DEFAULT, Pixels, to_array, to_image
from resnet_flax.data.rand_augment import rand_augment, trivial_augment
from resnet_flax.data.resizing import Box, center_box, crops, resized_crops, shorter_size

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Transforms of a training image. Flips and colour changes follow on the device.

    Attributes:
      crop: 'none' (images as they are, all of one size), 'jitter' (He et al. 2015, section 3.4)
        or 'random_resized' (Szegedy et al. 2015).
      sizes: sides of the training images: one, or one for each interval of steps.
      boundaries: steps at which the next of `sizes` is used (progressive resizing).
      jitter: smallest and largest shorter side before the crop.
      crop_area: smallest and largest fraction of the image's area.
      crop_ratio: smallest and largest width divided by height.
      policy: 'none', 'randaugment' or 'trivialaugment'.
      operations: of RandAugment.
      magnitude: of RandAugment.
      interpolation: a key of `FILTERS`.
      pixels: see `Pixels`.
    """

    crop: str = "none"
    sizes: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    jitter: tuple[int, int] = (256, 480)
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    policy: str = "none"
    operations: int = 2
    magnitude: int = 9
    interpolation: str = "bilinear"
    pixels: Pixels = DEFAULT

    def __call__(self, image: Any, rng: np.random.Generator, step: int) -> np.ndarray:
        """A training image, `[h, w, c]` uint8.

        Args:
          image: a Pillow image or an array of `[h, w, c]` uint8.
          rng: random generator.
          step: of the example's batch.
        """
        image = self.pixels(image)
        if self.crop == "none" and self.policy == "none":
            return to_array(image)
        image = to_image(image)
        resample = FILTERS[self.interpolation]
        if self.crop != "none":
            size = self._size(step)
            if self.crop == "jitter":
                image = jitter_crop(image, rng, size, self.jitter, resample)
            else:
                box = random_box(image.size, rng, self.crop_area, self.crop_ratio)
                image = image.crop(box).resize((size, size), resample)
        if self.policy == "randaugment":
            image = rand_augment(image, rng, self.operations, self.magnitude)
        elif self.policy == "trivialaugment":
            image = trivial_augment(image, rng)
        return to_array(image)

    def shape(self, image: tuple[int, ...], step: int) -> tuple[int, ...]:
        """The shape of a training image, `(h, w, c)`.

        Args:
          image: the shape before the transform, in the channels of `pixels`.
          step: of the example's batch.
        """
        return image if self.crop == "none" else (*2 * (self._size(step),), image[-1])

    def _size(self, step: int) -> int:
        return self.sizes[bisect_right(self.boundaries, step)]


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resize and centre crop, or nothing.

    Attributes:
      size: side of the crop; 0 leaves images as they are.
      crop_fraction: the crop's side divided by the resized shorter side.
      interpolation: a key of `FILTERS`.
      pixels: see `Pixels`.
    """

    size: int = 0
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    pixels: Pixels = DEFAULT

    @property
    def shorter(self) -> int:
        """The resized shorter side in pixels."""
        return math.floor(self.size / self.crop_fraction + 1e-6)

    def __call__(self, image: Any) -> np.ndarray:
        """The transformed image, `[h, w, c]` uint8, from a Pillow image or an array."""
        image = self.pixels(image)
        if not self.size:
            return to_array(image)

        def boxes(size: tuple[int, int]) -> list[Box]:
            return [center_box(size, (self.size, self.size))]

        return crops(image, self.shorter, boxes, FILTERS[self.interpolation])[0]


@dataclasses.dataclass(frozen=True)
class TenCropTransform:
    """The centre and the four corners of the resized image (He et al. 2015, section 3.4).

    Attributes:
      size: side of the crops.
      shorter: the resized shorter side.
      interpolation: a key of `FILTERS`.
      pixels: see `Pixels`.
    """

    size: int
    shorter: int
    interpolation: str = "bilinear"
    pixels: Pixels = DEFAULT

    def __call__(self, image: Any) -> np.ndarray:
        """Five crops, `[5, h, w, c]` uint8. Flips follow on the device."""
        image = self.pixels(image)
        return np.stack(crops(image, self.shorter, self._boxes, FILTERS[self.interpolation]))

    def _boxes(self, size: tuple[int, int]) -> list[Box]:
        right, bottom = (side - self.size for side in size)
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        return [
            center_box(size, (self.size, self.size)),
            *((x, y, x + self.size, y + self.size) for x, y in corners),
        ]


@dataclasses.dataclass(frozen=True)
class ScaleTransform:
    """The complete image at one scale.

    The longer side is center-cropped to `shorter` plus a multiple of `multiple` pixels: the largest
    of `lengths` such sides that fits. Nothing is padded, so every position sees only image pixels,
    and all images have fewer than twice `lengths` different shapes.

    Attributes:
      shorter: the resized shorter side.
      multiple: in pixels; 0 crops nothing.
      lengths: number of different longer sides.
      interpolation: a key of `FILTERS`.
      pixels: see `Pixels`.
    """

    shorter: int
    multiple: int = 32
    lengths: int = 20
    interpolation: str = "bilinear"
    pixels: Pixels = DEFAULT

    def __call__(self, image: Any) -> np.ndarray:
        """The image, `[h, w, c]` uint8; images differ in shape."""
        image = self.pixels(image)
        return crops(image, self.shorter, self._boxes, FILTERS[self.interpolation])[0]

    def _boxes(self, size: tuple[int, int]) -> list[Box]:
        if not self.multiple:
            return [(0, 0, *size)]
        return [center_box(size, (self._cropped(size[0]), self._cropped(size[1])))]

    def _cropped(self, side: int) -> int:
        more = min((side - self.shorter) // self.multiple, self.lengths - 1)
        return self.shorter + more * self.multiple


def jitter_crop(
    image: Image.Image,
    rng: np.random.Generator,
    size: int,
    shorter: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """A random square of the image with a random shorter side (He et al. 2015, section 3.4)."""
    width, height = shorter_size(image.size, int(rng.integers(shorter[0], shorter[1] + 1)))
    left, top = (int(rng.integers(0, side - size + 1)) for side in (width, height))
    box = (left, top, left + size, top + size)
    return resized_crops(image, (width, height), [box], resample)[0]


def random_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A rectangle of random area, aspect ratio and position (Szegedy et al. 2015, section 6).

    If none of ten draws fits, it is the largest one in the middle with an allowed aspect
    ratio, as in most implementations.

    Args:
      size: width and height of the image.
      rng: draws.
      area: smallest and largest fraction of the image's area, drawn uniformly.
      ratio: smallest and largest width divided by height, drawn log-uniformly.

    Returns:
      Left, top, right and bottom.
    """
    width, height = size
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

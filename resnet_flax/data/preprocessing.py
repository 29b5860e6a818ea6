"""From an image's pixels to a network's normalised input.

The only place where images are normalised, for training, evaluation and published weights alike.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from resnet_flax.data.pixels import Pixels
from resnet_flax.data.transforms import FILTERS, EvalTransform
from resnet_flax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_EXPECTED = {
    "size": "a number of pixels from 0 to 16384",
    "crop_fraction": "a number from 0.05 to 1",
    "interpolation": f"one of {', '.join(FILTERS)}",
    "mean": "finite numbers",
    "std": "finite numbers other than 0",
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize and centre crop on the host, normalisation on the device.

    Attributes:
      size: side of the crop; 0 uses images as they are.
      crop_fraction: the crop's side divided by the resized shorter side.
      interpolation: 'bilinear' or 'bicubic'.
      mean: of pixels in [0, 1], one number or one per channel.
      std: the same.
      pixel_mean: the mean image, `[h][w][c]` from 0 to 255, subtracted first; empty for none.
      exif: 'off' or 'on', see `Pixels`. The defaults of this and the next two are what torchvision
        does, and what checkpoints and weights that do not say it were made with.
      alpha: 'drop', 'white' or 'error', see `Pixels`.
      channels: 1, 3 or 4, or 0 for those of the data, see `Pixels`.

    Raises:
      UserError: a value is invalid.
    """

    size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pixel_mean: tuple[Any, ...] = ()
    exif: str = "off"
    alpha: str = "drop"
    channels: int = 0

    def __post_init__(self) -> None:
        def numbers(values: Any) -> bool:
            return isinstance(values, tuple) and all(
                isinstance(n, int | float) and math.isfinite(n) for n in values
            )

        fits = {
            "size": isinstance(self.size, int) and 0 <= self.size <= 2**14,
            "crop_fraction": isinstance(self.crop_fraction, int | float)
            and 0.05 <= self.crop_fraction <= 1,
            "interpolation": self.interpolation in FILTERS,
            "mean": numbers(self.mean) and len(self.mean) > 0,
            "std": numbers(self.std) and len(self.std) > 0 and 0 not in self.std,
        }
        for name, fine in fits.items():
            if not fine:
                raise UserError(
                    f"{name} of a preprocessing must be {_EXPECTED[name]}, not "
                    f"{getattr(self, name)!r}"
                )
        _ = self.pixels  # which checks its own

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError if images `[h, w, c]` of this shape cannot be normalised."""
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, shape[-1]):
                given = ",".join(map(str, getattr(self, name)))
                raise UserError(
                    f"--{name}={given} has {len(getattr(self, name))} numbers, but "
                    f"the images have {shape[-1]} channel{'s' * (shape[-1] > 1)}; give one number "
                    "or one a channel, or convert the images by --channels"
                )
        if len(self.pixel_mean):
            of = np.shape(self.pixel_mean)
            if of != shape:
                raise UserError(
                    f"the mean image has shape {list(of)}, the images {list(shape)}; give images "
                    "of that size, or a --mean"
                )

    @property
    def transform(self) -> EvalTransform:
        """The transform on the host."""
        return EvalTransform(self.size, self.crop_fraction, self.interpolation, self.pixels)

    @property
    def pixels(self) -> Pixels:
        """The first step of the transform."""
        return Pixels(self.exif, self.alpha, self.channels)

    def normalize(
        self, images: UInt8[Array, "b h w c"], dtype: Any = jnp.float32
    ) -> Float[Array, "b h w c"]:
        """Normalisation on the device: both steps below; training crops and flips between them."""
        return self.standardize(self.subtract_mean_image(images), dtype)

    def subtract_mean_image(self, images: UInt8[Array, "b h w c"]) -> Num[Array, "b h w c"]:
        """Subtracts the mean image, if there is one; images and result are from 0 to 255.

        This comes before a crop's padding, which then pads with the mean (He et al. 2015, section
        4.2).
        """
        if not len(self.pixel_mean):
            return images
        mean_image = jnp.asarray(np.array([self.pixel_mean], np.float32))
        return images.astype(mean_image.dtype) - mean_image

    def standardize(self, images: Num[Array, "b h w c"], dtype: Any) -> Float[Array, "b h w c"]:
        """Pixels in [0, 1], less `mean`, divided by `std`.

        Computed from 0 to 255, as a subtraction and then a division: compilers cannot fuse these
        into one operation that rounds once, so every program gives the same bits.

        Args:
          images: from 0 to 255.
          dtype: of the result; computed in float32 or more.
        """
        levels = images.astype(np.promote_types(dtype, np.float32))
        mean, std = (
            jnp.asarray(np.multiply(value, 255).reshape(1, 1, 1, -1), levels.dtype)
            for value in (self.mean, self.std)
        )
        return ((levels - mean) / std).astype(dtype)

    def to_json(self) -> dict[str, Any]:
        """The form in checkpoints and exported files."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`.

        Other keys are ignored: checkpoints up to version 0.1 have an `image_shape` too. Before
        2026-11-29 there was no `exif`, `alpha` or `channels`.
        """
        known: dict[str, Any] = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if field.name in values
        }
        for key, value in known.items():
            known[key] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

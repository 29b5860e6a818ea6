"""What makes a network's input of an image, from the file's pixels to normalised numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from resnet_flax.data import augment
from resnet_flax.data.transforms import EvalTransform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize and centre crop on the host, normalisation on the device.

    Attributes:
      size: side of the crop; 0 takes images as they are.
      crop_fraction: the crop's side by the shorter side that is resized to.
      interpolation: 'bilinear' or 'bicubic'.
      mean: of pixels in [0, 1]: one number, or one a channel.
      std: the same.
      pixel_mean: `[h][w][c]` grey levels, subtracted first; empty for none.
    """

    size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pixel_mean: tuple[Any, ...] = ()

    @property
    def transform(self) -> EvalTransform:
        """What the host does."""
        return EvalTransform(self.size, self.crop_fraction, self.interpolation)

    def normalize(
        self, images: UInt8[Array, "b h w c"], dtype: Any = jnp.float32
    ) -> Float[Array, "b h w c"]:
        """What the device does."""
        if len(self.pixel_mean):
            pixel_mean = jnp.asarray(np.array(self.pixel_mean, np.float32))
            return augment.normalize(
                augment.less_pixel_mean(images, pixel_mean), self.mean, self.std, dtype
            )
        return augment.normalize(images, self.mean, self.std, dtype)

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's metadata hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`; what else is there is left out."""
        known: dict[str, Any] = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if field.name in values
        }
        for key, value in known.items():
            known[key] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

"""What is done to images on the device, inside the compiled step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def normalize(
    images: UInt8[Array, "b h w c"], mean: Sequence[float], std: Sequence[float], dtype: Any
) -> Float[Array, "b h w c"]:
    """Pixels in [0, 1], less `mean`, divided by `std` (each one number, or one a channel)."""
    pixels = images.astype(jnp.promote_types(dtype, jnp.float32)) / 255
    centred = pixels - jnp.asarray(mean, pixels.dtype)
    return (centred / jnp.asarray(std, pixels.dtype)).astype(dtype)


def augment(
    images: UInt8[Array, "b h w c"], step: Int[Array, ""], *, seed: int, pad: int, flip: bool
) -> UInt8[Array, "b h w c"]:
    """CIFAR's augmentation: pad, crop at random to the size, mirror half (paper, section 4.2).

    What happens to an example depends on the seed and on its position in the stream of all
    training examples, and on nothing else: neither on the batch size's division over hosts and
    devices nor on what ran before.

    Args:
      images: a global batch.
      step: its number; its first example is number `step * b` of the stream.
      seed: of all augmentation.
      pad: zero pixels on each side before the crop; 0 for no crop.
      flip: mirror half of the images left to right.
    """
    b, h, w, c = images.shape
    position = step.astype(jnp.uint32) * b + jnp.arange(b, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), position)

    def one(image: Array, key: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if pad:
            corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = jax.lax.dynamic_slice(padded, (*corner, 0), (h, w, c))
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, keys) if pad or flip else images

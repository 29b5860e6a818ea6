"""Augmentation on the device, inside the compiled step.

How an example is augmented depends only on the seed and on its position in the stream of training
examples, not on how the batch is sharded or on what ran before. Mixing draws once per batch, from
the seed and the step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

Images = Float[Array, "b h w c"]
Targets = Float[Array, "b classes"]
Seed = int | Int[Array, ""]

# Principal components of ImageNet's RGB values in [0, 1] (Krizhevsky et al. 2012, section 4.1),
# with the numbers of fb.resnet.torch: the eigenvalues, and the components as columns.
COLOUR_EIGENVALUES = (0.2175, 0.0188, 0.0045)
COLOUR_COMPONENTS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def crop_and_flip(
    images: Num[Array, "b h w c"], step: Int[Array, ""], *, seed: Seed, pad: int, flip: bool
) -> Num[Array, "b h w c"]:
    """CIFAR's augmentation: pad, random crop, random flip (He et al. 2015, section 4.2).

    Args:
      images: a global batch.
      step: number of the batch; its first example has position `step * b` in the stream.
      seed: of the augmentation.
      pad: zero pixels on each side before the crop; 0 for no crop.
      flip: flip half of the images left to right.
    """
    h, w, c = images.shape[1:]

    def one(image: Array, key: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if pad:
            corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1, jnp.int32)
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = jax.lax.dynamic_slice(padded, (*corner, jnp.int32(0)), (h, w, c))
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, _keys(seed, step, len(images))) if pad or flip else images


def pca_lighting(
    x: Images, step: Int[Array, ""], *, seed: Seed, alpha_std: float, std: Sequence[float]
) -> Images:
    """Adds random multiples of the principal components of colour to each image.

    Args:
      x: normalised RGB images.
      step: number of the batch.
      seed: of the augmentation.
      alpha_std: standard deviation of the multiples; 0.1 in the paper.
      std: standard deviation that the images were divided by.
    """
    keys = _keys(seed, step, len(x), use=1)
    draws = jax.vmap(lambda key: jax.random.normal(key, (3,), jnp.float32))(keys)
    scale = alpha_std * np.multiply(COLOUR_COMPONENTS, COLOUR_EIGENVALUES)
    components = jnp.asarray(scale / np.reshape(std, (-1, 1)), jnp.float32)
    first, second, third = (_product(draws[:, k, None], components[None, :, k]) for k in range(3))
    shifts = first + second + third
    return x + shifts[:, None, None].astype(x.dtype)


def erase(x: Images, step: Int[Array, ""], *, seed: Seed, probability: float) -> Images:
    """Random erasing: sets a rectangle of some images to 0, the mean colour (Zhong et al. 2020).

    The rectangle has 2 to 33 % of the area and a ratio of 0.3 to 3.3. It is clipped to the image.

    Args:
      x: normalised images.
      step: number of the batch.
      seed: of the augmentation.
      probability: of erasing a rectangle of an image.
    """
    h, w = x.shape[1:3]

    def one(image: Array, key: Array) -> Array:
        wanted, area, ratio, *corner = jax.random.uniform(key, (5,), jnp.float32)
        area = h * w * (0.02 + 0.31 * area)
        ratio = jnp.exp(jnp.log(0.3) + (jnp.log(3.3) - jnp.log(0.3)) * ratio)
        height = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, h)
        width = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, w)
        top = jnp.floor(corner[0] * (h - height + 1))
        left = jnp.floor(corner[1] * (w - width + 1))
        inside = _box(h, w, top, left, top + height, left + width)
        return jnp.where(inside & (wanted < probability), 0, image)

    return jax.vmap(one)(x, _keys(seed, step, len(x), use=2))


def mix(
    x: Images,
    targets: Targets,
    step: Int[Array, ""],
    *,
    seed: Seed,
    mixup: float,
    cutmix: float,
    distance: int = 1,
) -> tuple[Images, Targets]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of each image with its neighbour.

    If both are enabled, one of the two is drawn for each batch.

    Args:
      x: normalised images.
      targets: probabilities of the classes.
      step: number of the batch.
      seed: of the augmentation.
      mixup: alpha of the beta distribution that the mixing weight is drawn from; 0 for none.
      cutmix: the same.
      distance: the neighbour is this many places before the image in the global batch; the number
        of times that an image is repeated in a row, so that it is a different image.
    """
    h, w = x.shape[1:3]
    keys = jax.random.split(jax.random.fold_in(_key(seed, use=3), step), 5)
    cut = jax.random.bernoulli(keys[0], jnp.float32(0.5)) if mixup and cutmix else cutmix > 0
    share = jnp.where(
        cut,
        jax.random.beta(keys[1], cutmix or 1.0, cutmix or 1.0, dtype=jnp.float32),
        jax.random.beta(keys[2], mixup or 1.0, mixup or 1.0, dtype=jnp.float32),
    )
    # The rectangle has the other image's fraction of the area, before it is clipped.
    reach = 0.5 * jnp.sqrt(1 - share)
    row, column = (jax.random.uniform(key, dtype=jnp.float32) for key in keys[3:])
    top, bottom = (jnp.round(h * jnp.clip(row + s * reach, 0, 1)) for s in (-1, 1))
    left, right = (jnp.round(w * jnp.clip(column + s * reach, 0, 1)) for s in (-1, 1))
    share = jnp.where(cut, 1 - (bottom - top) * (right - left) / (h * w), share)
    inside = _box(h, w, top, left, bottom, right)
    other = jnp.roll(x, distance, axis=0)
    blended = (_product(share, x) + _product(1 - share, other)).astype(x.dtype)
    x = jnp.where(cut, jnp.where(inside[None], other, x), blended)
    others = jnp.roll(targets, distance, axis=0)
    return x, _product(share, targets) + _product(1 - share, others)


def _product(a: Array, b: Array) -> Array:
    """`a * b` in float32 or more, rounded to one bit less.

    The rounding keeps compilers from fusing the product and a following sum into one operation,
    which they do in some programs only: the same image has the same bits in every program.
    """
    wide = np.promote_types(a.dtype, b.dtype)
    product = a.astype(wide) * b.astype(wide)
    info = jnp.finfo(product.dtype)
    return jax.lax.reduce_precision(product, info.nexp, info.nmant - 1)


def _key(seed: Seed, use: int) -> Array:
    """A different key for each use of randomness."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, 2**32 - 1 - use) if use else key


def _keys(seed: Seed, step: Array, b: int, use: int = 0) -> Array:
    """A key for each example of a batch, by its position in the stream."""
    position = step.astype(jnp.uint32) * b + jnp.arange(b, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(_key(seed, use), position)


def _box(h: int, w: int, top: Array, left: Array, bottom: Array, right: Array) -> Array:
    """`[h, w, 1]`, true in the rectangle."""
    rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in (h, w))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, None] & in_columns[None, :])[..., None]

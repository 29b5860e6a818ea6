"""The networks that are compared with torch's, and the random weights that both sides get."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax import create_model

CLASSES = 7
SHALLOW = {"stage_sizes": (2, 1, 1, 1)}
DILATED = {"stage_sizes": (1, 1, 2, 2), "output_stride": 8}

# The axes, and the layout of the torch network that ours is to equal (see torch_networks.py). A
# name is a variant's, with what sets the case apart behind a space.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "resnet18": (SHALLOW, "torchvision"),
    "resnet50": (SHALLOW, "torchvision"),
    "resnet18 dilated": (DILATED, "timm"),
    "resnet50 dilated": (DILATED, "torchvision"),
    "resnet50d dilated": (DILATED, "timm"),
    "resnetv2_18 dilated": (DILATED, "timm_v2"),
    "resnext50_32x4d": (SHALLOW, "torchvision"),
    "wide_resnet50_2": (SHALLOW, "torchvision"),
    "resnet50_v1": (SHALLOW, "timm_v1"),
    "resnet50d": (SHALLOW, "timm"),
    "seresnet18": (SHALLOW | {"se_divisor": 8}, "timm"),
    "seresnet50": (SHALLOW, "timm"),
    "seresnext50_32x4d": (SHALLOW, "timm"),
    "resnetv2_18": (SHALLOW, "timm_v2"),
    "resnetv2_50": (SHALLOW, "timm_v2"),
    "resnetv2_18d": (SHALLOW, "timm_v2"),
    "resnetv2_50d_gn": (SHALLOW, "timm_v2"),
    "resnet50s": (SHALLOW, "timm"),
    "seresnext101d_32x8d": (SHALLOW, "timm"),
    "cifar_resnet20": ({}, "akamaster"),
}


def network(name: str, dtype: Any) -> Any:
    """Our network of a case, with torch's running variance."""
    param_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    types = {"dtype": dtype, "param_dtype": param_dtype}
    variant = name.split()[0]
    return create_model(variant, num_classes=CLASSES, norm_unbiased=True, **CASES[name][0], **types)


def images(name: str) -> np.ndarray:
    """Four random images of different colours, `[4, h, w, 3]` float64; not square, of odd sides."""
    side = (16, 20) if name.startswith("cifar") else (65, 79)
    rng = np.random.default_rng(1)
    return rng.normal(size=(4, *side, 3)) + 2 * rng.normal(size=(4, 1, 1, 3))


def sample(feature_map: Any) -> Any:
    """Of a map `[b, h, w, c]`, what the goldens keep: a sum over channels at a few places."""
    _, h, w, c = feature_map.shape
    places = np.arange(CLASSES)
    weights = np.cos(np.outer(places + 1, np.arange(c)))
    return (feature_map[:, places % h, places * 3 % w] * weights).sum(-1)


def random_variables(name: str) -> dict[str, Any]:
    """Float64 weights and non-trivial statistics, each array drawn by its own name.

    Kernels keep the scale of what they are applied to; scales and variances are around one,
    biases and means are not zero.
    """
    shapes = jax.eval_shape(
        lambda: network(name, jnp.float32).init(
            jax.random.key(0), jnp.zeros(images(name).shape), train=False
        )
    )

    def draw(path: Any, leaf: Any) -> np.ndarray:
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        values = np.random.default_rng(zlib.crc32(text.encode())).normal(size=leaf.shape)
        if text.endswith(("var", "scale")):
            return 0.5 + 0.5 * np.abs(values)
        if text.endswith("kernel"):
            return values / np.sqrt(np.prod(leaf.shape[:-1]))
        return 0.3 * values

    return jax.tree_util.tree_map_with_path(draw, shapes)

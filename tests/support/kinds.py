"""One tiny network of each kind, in float64, with variables, images and directions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax import create_model

SMALL = {"stage_sizes": (1, 1), "stage_features": (4, 8), "stem_features": 4, "num_classes": 3}
KINDS = {
    "basic": ("resnet18", {}),
    "bottleneck": ("resnet50", {}),
    "preact_basic": ("cifar_resnetv2_110", {}),
    "preact_bottleneck": ("resnetv2_50", {}),
    "resnext": ("resnext50_32x4d", {"groups": 2, "width_per_group": 32}),
    "squeeze_excitation": ("seresnet50", {"se_ratio": 2}),
    "resnet_d": ("resnet18d", {}),
    "plain": ("cifar_plain20", {}),
    "group_norm": ("cifar_resnet20", {"norm": "group"}),
    "scanned": ("cifar_resnet20", {"scan": True, "stage_sizes": (3, 1)}),
    "remat": ("cifar_resnet20", {"remat": 1, "stage_sizes": (2, 1)}),
    "dilated": (
        "resnet18",
        {"output_stride": 8, "stage_sizes": (1, 1, 1), "stage_features": (4, 4, 8)},
    ),
}
SIDE = 16


def network(kind, implementation="auto", **overrides):
    """The network."""
    variant, own = KINDS[kind]
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64, "implementation": implementation}
    return create_model(variant, **{**SMALL, **own, **types, **overrides})


def drawn_for(model, batch=2):
    """Random variables, images, and a direction for each parameter and pixel."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, SIDE, SIDE, 3)))
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)

    def draw(path, leaf):
        positive = path[-1].key in ("scale", "var")
        values = 0.5 + rng.uniform(size=leaf.shape) if positive else rng.normal(size=leaf.shape) / 3
        return jnp.asarray(values)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    directions = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (variables["params"], x)
    )
    return variables, x, directions

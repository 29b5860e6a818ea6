"""Residual and plain networks, and the table of the variants that have names."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resnet_flax.errors import UserError, closest
from resnet_flax.models.blocks import SHORTCUTS, BasicBlock
from resnet_flax.models.conv import Conv
from resnet_flax.models.norm import BatchNorm

Dtype = Any

# As torch's nn.Linear: uniform within +-1 / sqrt(features).
head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks, mean over positions, linear head.

    The first block of every stage but the first halves height and width. Parameters are named
    `stem/conv1/kernel`, `stage1_block1/conv1/kernel`, `stage1_block1/norm1/scale`,
    `stage2_block1/shortcut/conv/kernel`, `head/kernel`: weight import, decay masks and
    checkpoints stand on these names.

    Attributes:
      stage_sizes: number of blocks of each stage.
      stage_features: output channels of each stage's blocks.
      shortcut: 'A', 'B', 'C' (He et al. 2015, section 3.3) or 'none', a plain network.
      num_classes: outputs of the head.
      norm_groups: groups of examples that batch normalisation treats by themselves.
      norm_momentum: what running statistics keep of themselves in a step.
      dtype: type of the computation; logits are of `param_dtype` all the same.
      param_dtype: type of parameters, statistics and logits.
    """

    stage_sizes: tuple[int, ...]
    stage_features: tuple[int, ...]
    shortcut: str = "B"
    num_classes: int = 1000
    norm_groups: int = 1
    norm_momentum: float = 0.9
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, features: bool = False
    ) -> Float[Array, "b classes"] | dict[str, Array]:
        """Logits `[b, classes]`, or all feature maps.

        Args:
          x: normalised images.
          train: normalise by the batch's statistics and update the running ones (the caller
            makes `batch_stats` mutable) rather than use those.
          features: return a dict of the stages' maps `c2`, `c3`, ..., `pooled` and `logits`.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, **types)
        norm = partial(BatchNorm, self.norm_groups, self.norm_momentum, **types)
        maps: dict[str, Array] = {}
        x = Stem(self.stage_features[0], conv, norm, name="stem")(x, train)
        for stage, (size, width) in enumerate(
            zip(self.stage_sizes, self.stage_features, strict=True), start=1
        ):
            for block in range(1, size + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(width, strides, self.shortcut, conv, norm, name=name)(x, train)
            maps[f"c{stage + 1}"] = x
        pooled = x.astype(self.param_dtype).mean((1, 2))
        head = nn.Dense(
            self.num_classes, name="head", kernel_init=head_init, param_dtype=self.param_dtype
        )
        logits = head(pooled)
        return {**maps, "pooled": pooled, "logits": logits} if features else logits


class Stem(nn.Module):
    """The CIFAR nets' first layer: one 3x3 convolution (He et al. 2015, section 4.2)."""

    features: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w f"]:
        """What the first stage takes."""
        x = self.conv(self.features, (3, 3), name="conv1")(x)
        return nn.relu(self.norm(name="norm1")(x, train))


def _cifar(depth: int, shortcut: str) -> dict[str, Any]:
    """The 6n+2 layers of section 4.2: 3 stages of n blocks, 16, 32 and 64 channels."""
    n = (depth - 2) // 6
    return {
        "stage_sizes": (n, n, n),
        "stage_features": (16, 32, 64),
        "shortcut": shortcut,
        "num_classes": 10,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    # The paper's depths, and 8 for quick looks.
    **{f"cifar_resnet{d}": _cifar(d, "A") for d in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{d}": _cifar(d, "none") for d in (8, 20, 32, 44, 56, 110)},
}

# What create_model accepts beside the name: the network's axes, not linen's own fields.
AXES = tuple(name for name in ResNet.__annotations__ if name not in ("parent", "name"))


def create_model(name: str, **axes: Any) -> ResNet:
    """The network called `name`, with any of its axes changed.

    Args:
      name: a key of `VARIANTS`, such as 'cifar_resnet20'.
      **axes: attributes of `ResNet`, such as `num_classes`, `dtype`, `shortcut`.

    Returns:
      A linen module: `model.init(key, x, train=False)` makes its variables and
      `model.apply(variables, x, train=False)` float32 logits.

    Raises:
      UserError: the name or an axis is unknown, or an axis has no such value.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no model called {name!r}{closest(name, VARIANTS)}")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"{name} has no axis called {axis!r}{closest(axis, AXES)}")
    settings = {**VARIANTS[name], **axes}
    if settings["shortcut"] not in SHORTCUTS:
        raise UserError(
            f"shortcut must be one of {', '.join(SHORTCUTS)}, not {settings['shortcut']!r}"
        )
    return ResNet(**settings)

"""Residual blocks, their shortcuts, and squeeze-and-excitation."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.models.conv_norm import conv_norm, norm_act
from resnet_flax.models.layers import Conv
from resnet_flax.ops import is_symbolic, relu

SHORTCUTS = ("A", "B", "C", "none")

Map = Float[Array, "b h w c"]
MapOut = Float[Array, "b h2 w2 f"]
BlockInput = Float[Array, "b h1 w1 c1"]  # its shape differs from maps within the block


class Shortcut(nn.Module):
    """What is added to a block's residual branch (He et al. 2015, section 3.3 and table 3).

    Option A has no parameters: the identity, taken at every `strides`-th position and padded
    with zero channels where the shape changes. B projects (1x1 convolution and normalisation)
    where the shape changes; C always.

    Attributes:
      option: 'A', 'B' or 'C'.
      features: output channels.
      strides: the block's stride.
      conv: makes a convolution from features, kernel size and strides.
      norm: makes a normalisation; None for none after the projection (pre-activation).
      pool: average pooling with the stride before the projection (ResNet-D, He et al. 2018, 4.1);
        with stride 1 if the stride was replaced by dilation.
    """

    option: str
    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any] | None
    pool: bool = False

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's input in the shape of its output."""
        if not projects(self.option, x.shape[-1], self.features, self.strides):
            if self.strides == 1 and x.shape[-1] == self.features:
                return x
            x = every(x, self.strides)
            # Half on either side, as in the published CIFAR weights; all on one side would be the
            # same network up to a permutation of channels.
            extra = self.features - x.shape[-1]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        strides = self.strides
        if self.pool:
            x = average_pool(x, strides) if strides > 1 else smooth(x)
            strides = 1
        conv = self.conv(self.features, (1, 1), strides=strides, name="conv")
        if self.norm is None:
            return conv(x)
        return conv_norm(conv, self.norm(name="norm"), x, train)


def projects(option: str, channels: int, features: int, strides: int) -> bool:
    """Whether a shortcut has parameters."""
    return option == "C" or (option == "B" and (strides > 1 or channels != features))


def every(x: Map, strides: int) -> Float[Array, "b h2 w2 c"]:
    """Every `strides`-th position."""
    if not is_symbolic(x.shape):
        return x[:, ::strides, ::strides]
    # A window's number of positions has the same form as a convolution's, so that `jax.export` can
    # see that they are equal; a slice's has not.
    return nn.avg_pool(x, (1, 1), (strides, strides))


def average_pool(x: Map, size: int) -> Float[Array, "b h2 w2 c"]:
    """Average pooling with stride `size`; windows at the edge are clipped."""
    # Of a symbolic side, in the form of a convolution's number of positions: see `every`. What no
    # window covers has no effect.
    over = [(0, size - 1 if is_symbolic([n]) else -n % size) for n in x.shape[1:3]]
    dtype = np.promote_types(x.dtype, np.float32)
    ones = jnp.ones((1, *x.shape[1:3], 1), dtype)
    sums, counts = (
        nn.pool(each, 0.0, lax.add, (size, size), (size, size), over) for each in (x, ones)
    )
    return sums.astype(dtype) / counts


def smooth(x: Map) -> Map:
    """2x2 average pooling with stride 1, zero-padded, as in timm."""
    return nn.avg_pool(x, (2, 2), (1, 1), [(0, 1), (0, 1)])


class SqueezeExcitation(nn.Module):
    """Channels weighted by a function of their means over the map (Hu et al. 2018, section 3).

    Attributes:
      ratio: channels over squeezed channels.
      multiple: squeezed channels are rounded to a multiple of this, as in timm; 1 in the paper.
      dtype: type of the computation.
      param_dtype: type of the parameters.
      implementation: see `ResNet`; Flax's ReLU has a derivative of its own, like ours.
    """

    ratio: int
    multiple: int
    dtype: Any
    param_dtype: Any
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """`x`, every channel times a factor between 0 and 1."""
        c = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        squeezed = squeezed_features(c, self.ratio, self.multiple)
        s = nn.Dense(squeezed, name="reduce", **types)(x.mean((1, 2)))
        s = relu(s) if self.implementation == "xla" else nn.relu(s)
        s = nn.Dense(c, name="expand", **types)(s)
        return x * jax.nn.sigmoid(s)[:, None, None]


def squeezed_features(features: int, ratio: int, multiple: int) -> int:
    """The number of squeezed channels, rounded to the nearest multiple (at least one)."""
    return max(multiple, int(features / ratio + multiple / 2) // multiple * multiple)


class ResidualBlock(nn.Module):
    """The base of all blocks: their attributes, and how a block ends.

    Attributes:
      features: the stage's width; the output has `expansion` times as many channels.
      strides: the block's stride.
      dilation: of the 3x3 convolutions.
      first_dilation: of the first 3x3 convolution. In the first block of a stage whose stride was
        replaced by dilation, it is the previous stage's.
      shortcut: one of `SHORTCUTS`; with 'none' the block is part of a plain network.
      avg_down: see `Shortcut`.
      zero_init: initialise the last normalisation's scale to zero, and so the block to the
        identity.
      groups: of a bottleneck's 3x3 convolution (ResNeXt's cardinality).
      width_per_group: of a bottleneck, see `ResNet`.
      stride_on: the bottleneck's convolution with the stride, '1x1' or '3x3'.
      make_se: makes squeeze-and-excitation, or None.
      conv: makes a convolution from features and kernel size.
      norm: makes a normalisation.
    """

    features: int
    strides: int
    dilation: int
    first_dilation: int
    shortcut: str
    avg_down: bool
    zero_init: bool
    groups: int
    width_per_group: int
    stride_on: str
    make_se: Callable[..., Any] | None
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    expansion: ClassVar[int] = 1
    grouped: ClassVar[bool] = False  # whether groups and width_per_group have an effect

    def _relu_of_sum(self, conv: Conv, name: str, y: Map, x: BlockInput, train: bool) -> MapOut:
        """The last convolution, its normalisation, the shortcut of `x`, and ReLU of the sum."""
        zero = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
        norm = self.norm(name=name, **zero)
        if self.make_se is None:
            return conv_norm(conv, norm, y, train, True, lambda: self._added(x, train, self.norm))
        y = self.make_se(name="se")(conv_norm(conv, norm, y, train))
        added = self._added(x, train, self.norm)
        return relu(y if added is None else y + added)

    def _sum(self, y: MapOut, x: Map, normalized: Map, train: bool) -> MapOut:
        """The last convolution's output and the shortcut of `x`, or a projection of `normalized`.

        (He et al. 2016, section 4.1: activations before a projection are shared with the branch.)
        """
        if self.make_se is not None:
            y = self.make_se(name="se")(y)
        if projects(self.shortcut, x.shape[-1], y.shape[-1], self.strides):
            x = normalized
        added = self._added(x, train, None)
        return y if added is None else y + added

    def _added(self, x: Map, train: bool, norm: Callable[..., Any] | None) -> MapOut | None:
        if self.shortcut == "none":
            return None
        return Shortcut(
            self.shortcut,
            self.features * self.expansion,
            self.strides,
            self.conv,
            norm,
            self.avg_down,
            name="shortcut",
        )(x, train)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He et al. 2015, figure 5, left)."""

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's output; `train` as for `BatchNorm`."""
        conv1, conv2 = _two_convolutions(self)
        y = conv_norm(conv1, self.norm(name="norm1"), x, train, activate=True)
        return self._relu_of_sum(conv2, "norm2", y, x, train)


class Bottleneck(ResidualBlock):
    """1x1 to fewer channels, 3x3, and 1x1 to four times the width (figure 5, right).

    ResNeXt's is the same with groups (Xie et al. 2017, figure 3c).
    """

    expansion: ClassVar[int] = 4
    grouped: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's output; `train` as for `BatchNorm`."""
        conv1, conv2, conv3 = _three_convolutions(self)
        y = conv_norm(conv1, self.norm(name="norm1"), x, train, activate=True)
        y = conv_norm(conv2, self.norm(name="norm2"), y, train, activate=True)
        return self._relu_of_sum(conv3, "norm3", y, x, train)


class PreActBasicBlock(ResidualBlock):
    """A basic block that normalises and activates before its convolutions.

    He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4e. `zero_init` has no
    effect: the block does not end in a normalisation.
    """

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's output, not activated; `train` as for `BatchNorm`."""
        conv1, conv2 = _two_convolutions(self)
        normalized = norm_act(self.norm(name="norm1"), x, train)
        y = conv1(normalized)
        y = conv2(norm_act(self.norm(name="norm2"), y, train))
        return self._sum(y, x, normalized, train)


class PreActBottleneck(ResidualBlock):
    """A bottleneck that normalises and activates before its convolutions (He et al. 2016)."""

    expansion: ClassVar[int] = 4
    grouped: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's output, not activated; `train` as for `BatchNorm`."""
        conv1, conv2, conv3 = _three_convolutions(self)
        normalized = norm_act(self.norm(name="norm1"), x, train)
        y = conv1(normalized)
        y = conv2(norm_act(self.norm(name="norm2"), y, train))
        y = conv3(norm_act(self.norm(name="norm3"), y, train))
        return self._sum(y, x, normalized, train)


def _two_convolutions(block: ResidualBlock) -> tuple[Conv, Conv]:
    conv = partial(block.conv, block.features, (3, 3))
    return (
        conv(strides=block.strides, dilation=block.first_dilation, name="conv1"),
        conv(dilation=block.dilation, name="conv2"),
    )


def _three_convolutions(block: ResidualBlock) -> tuple[Conv, Conv, Conv]:
    inner = block.features * block.width_per_group // 64 * block.groups
    on_1x1, on_3x3 = (block.strides, 1) if block.stride_on == "1x1" else (1, block.strides)
    dilation, groups = block.first_dilation, block.groups
    return (
        block.conv(inner, (1, 1), strides=on_1x1, name="conv1"),
        block.conv(inner, (3, 3), strides=on_3x3, dilation=dilation, groups=groups, name="conv2"),
        block.conv(block.features * block.expansion, (1, 1), name="conv3"),
    )


# By `ResNet.block` and `ResNet.preactivation`. A block takes the attributes of `ResidualBlock`, and
# `(x, train)`.
BLOCKS: dict[tuple[str, bool], type[ResidualBlock]] = {
    ("basic", False): BasicBlock,
    ("bottleneck", False): Bottleneck,
    ("basic", True): PreActBasicBlock,
    ("bottleneck", True): PreActBottleneck,
}

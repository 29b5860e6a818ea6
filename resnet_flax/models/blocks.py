"""Residual blocks, their shortcuts, and squeeze-and-excitation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from resnet_flax.models.layers import conv_norm, norm_act
from resnet_flax.ops import relu

SHORTCUTS = ("A", "B", "C", "none")

Map = Float[Array, "b h w c"]
MapOut = Float[Array, "b h2 w2 f"]


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
      pool: stride by average pooling before the projection (ResNet-D, He et al. 2018, 4.1);
        where the stride became dilation, average without one.
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
            x = x[:, :: self.strides, :: self.strides]
            # Half on either side, as the published CIFAR weights have it; all on one side would
            # be the same network up to a permutation of channels.
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


def average_pool(x: Map, size: int) -> Float[Array, "b h2 w2 c"]:
    """Means over windows of `size` by `size` side by side, the last ones cut off by the edge."""
    over = [(0, -n % size) for n in x.shape[1:3]]
    return nn.avg_pool(x, (size, size), (size, size), over, count_include_pad=False)


def smooth(x: Map) -> Map:
    """Means over windows of 2 by 2 at every position, zeros beyond the edges, as timm has it."""
    return nn.avg_pool(x, (2, 2), (1, 1), [(0, 1), (0, 1)])


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole map holds (Hu et al. 2018, section 3).

    Attributes:
      ratio: channels over squeezed channels.
      multiple: squeezed channels are rounded to a multiple of this, as timm does; 1 for the
        authors' own.
      dtype: type of the computation.
      param_dtype: type of the parameters.
    """

    ratio: int
    multiple: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """`x`, every channel times a factor between 0 and 1."""
        c = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        squeezed = squeezed_features(c, self.ratio, self.multiple)
        s = nn.relu(nn.Dense(squeezed, name="reduce", **types)(x.mean((1, 2))))
        s = nn.Dense(c, name="expand", **types)(s)
        return x * jax.nn.sigmoid(s)[:, None, None]


def squeezed_features(features: int, ratio: int, multiple: int) -> int:
    """Channels that a squeeze leaves, rounded to the nearest multiple (at least one)."""
    return max(multiple, int(features / ratio + multiple / 2) // multiple * multiple)


class Block(nn.Module):
    """A residual block of any kind (He et al. 2015, figure 5; He et al. 2016, figure 4).

    Attributes:
      convs: of each convolution, output channels, kernel side, stride, dilation and groups.
      shortcut: one of `SHORTCUTS`; with 'none' the block is layers of a plain network.
      strides: the block's.
      preactivation: normalise and activate before the convolutions, not after; a projection
        then takes the normalised input.
      shortcut_pool: see `Shortcut`.
      zero_init: start the last normalisation's scale at zero, and so the block as the identity.
      squeeze: makes squeeze-and-excitation, or None.
      conv: makes a convolution.
      norm: makes a normalisation.
    """

    convs: tuple[tuple[int, int, int, int, int], ...]
    shortcut: str
    strides: int
    preactivation: bool
    shortcut_pool: bool
    zero_init: bool
    squeeze: Callable[..., Any] | None
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Map, train: bool) -> MapOut:
        """The block's output; `train` as for `BatchNorm`."""
        features = self.convs[-1][0]
        y, last = x, len(self.convs)
        for i, (width, side, strides, dilation, groups) in enumerate(self.convs, start=1):
            conv = self.conv(
                width,
                (side, side),
                strides=strides,
                dilation=dilation,
                groups=groups,
                name=f"conv{i}",
            )
            if self.preactivation:
                y = norm_act(self.norm(name=f"norm{i}"), y, train)
                if i == 1 and projects(self.shortcut, x.shape[-1], features, self.strides):
                    x = y
                y = conv(y)
                continue
            zero = {"scale_init": nn.initializers.zeros} if self.zero_init and i == last else {}
            norm = self.norm(name=f"norm{i}", **zero)
            if i < last:
                y = conv_norm(conv, norm, y, train, activate=True)
            elif self.squeeze is None:
                return conv_norm(conv, norm, y, train, True, partial(self._shortcut, x, train))
            else:
                y = conv_norm(conv, norm, y, train)
        if self.squeeze is not None:
            y = self.squeeze(name="se")(y)
        residual = self._shortcut(x, train)
        y = y if residual is None else y + residual
        return y if self.preactivation else relu(y)

    def _shortcut(self, x: Map, train: bool) -> MapOut | None:
        if self.shortcut == "none":
            return None
        return Shortcut(
            self.shortcut,
            self.convs[-1][0],
            self.strides,
            self.conv,
            None if self.preactivation else self.norm,
            self.shortcut_pool,
            name="shortcut",
        )(x, train)

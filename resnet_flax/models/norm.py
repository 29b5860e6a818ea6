"""Normalisation: over groups of examples, or over groups of channels."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.errors import UserError
from resnet_flax.models import lowering
from resnet_flax.models.conv import Pending, computed
from resnet_flax.models.conv_norm import normalize_3x3
from resnet_flax.models.normalize import How, finish, normalize, relu
from resnet_flax.models.pointwise import normalize_pointwise

Dtype = Any


def activated(
    norm: nn.Module,
    x: Float[Array, "b h w c"] | Pending,
    train: bool,
    residual: Array | None = None,
) -> Float[Array, "b h w c"]:
    """ReLU of a normalisation of `x`, to which `residual` is added before where there is one.

    In training that is one operation, which for its gradient keeps `x` alone (and with a residual
    its own output, which the next layer keeps as well); `pointwise` keeps a convolution's input and
    its own output. In evaluation the compiler joins them by itself, and the normalisation's own
    output can be looked at with `capture_intermediates`.

    Args:
      norm: `BatchNorm` or `GroupNorm`.
      x: feature maps, or the convolution that makes them.
      train: as for `BatchNorm`.
      residual: of the shape of `x`.
    """
    if train:
        return norm(x, train, activate=True, residual=residual)
    y = norm(x, train)
    return relu(y if residual is None else y + residual)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015), each group of examples by itself.

    In training the batch is cut into `groups` equal runs of examples, and each is normalised by
    its own mean and (biased) variance; the running statistics move towards the groups' average.
    One group is the usual batch normalisation, over the global batch however it is sharded.
    In evaluation the running statistics are used.

    Statistics, `scale` and `bias` are of `param_dtype` (float32), and the statistics are computed
    in it: in bfloat16 a mean over a large batch loses most of its digits.

    Attributes:
      groups: number of groups; divides the batch.
      momentum: what a running statistic keeps of itself in a step (1 - torch's momentum).
      unbiased: the running variance follows the unbiased variance of a group, as torch's does.
      epsilon: added to the variance.
      scale_init: initialiser of `scale`; zeros for the last normalisation of a block where the
        block is to start as the identity.
      dtype: type of the output.
      param_dtype: type of parameters and statistics.
    """

    groups: int = 1
    momentum: float = 0.9
    unbiased: bool = False
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"] | Pending,
        train: bool,
        activate: bool = False,
        residual: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises by the batch where `train`, updating the running statistics, else by those.

        Then adds `residual`, where there is one, and takes the ReLU, where `activate`.
        """
        b, h, w, c = x.shape
        scale = self.param("scale", self.scale_init, (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), self.param_dtype)
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * factor
            return finish(computed(x) * factor + shift, activate, residual).astype(self.dtype)
        if b % self.groups:
            raise ValueError(
                f"a batch of {b} does not divide into {self.groups} groups for batch "
                "normalisation; choose a multiple of the groups as the batch size"
            )
        behind = x.behind if isinstance(x, Pending) else None
        n = b // self.groups * h * w
        how = How(
            self.groups,
            self.epsilon,
            activate,
            self.dtype,
            self.param_dtype,
            lowering.normalisation(behind, self.groups),
            self.momentum,
            n / max(n - 1, 1) if self.unbiased else 1.0,
        )
        running = lax.stop_gradient((running_mean.value, running_var.value))
        if isinstance(x, Pending) and not x.behind.pointwise:
            (y, _, _), moved = normalize_3x3(how, x, scale, bias, residual, running)
        else:
            function: Any = normalize if behind is None else normalize_pointwise
            y, mean, var = function(how, x, scale, bias, residual, running[0])
            moved = how.moved(mean, var, running)
        if not self.is_initializing():
            running_mean.value, running_var.value = moved
        return y


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018): each example by itself, over groups of channels.

    Takes `BatchNorm`'s place: the same parameters, no statistics, `train` without effect.

    Attributes:
      channel_groups: 32, or as many as there are channels where these are fewer.
      epsilon: added to the variance.
      scale_init: initialiser of `scale`.
      dtype: type of the output.
      param_dtype: type of the parameters, and of the computation.
    """

    channel_groups: int = 32
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"] | Pending,
        train: bool,
        activate: bool = False,
        residual: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises, the same in training and evaluation; the rest as in `BatchNorm`."""
        del train
        x = computed(x)
        b, h, w, c = x.shape
        groups = min(self.channel_groups, c)
        if c % groups:
            raise UserError(f"group normalisation cannot cut {c} channels into {groups} groups")
        scale = self.param("scale", self.scale_init, (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        x = x.astype(self.param_dtype).reshape(b, h, w, groups, c // groups)
        mean = x.mean((1, 2, 4), keepdims=True)
        centred = x - mean
        var = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        y = (centred * lax.rsqrt(var + self.epsilon)).reshape(b, h, w, c)
        return finish(y * scale + bias, activate, residual).astype(self.dtype)

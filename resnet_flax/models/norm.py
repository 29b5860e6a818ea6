"""Normalisation: over groups of examples, or over groups of channels."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resnet_flax.errors import UserError
from resnet_flax.models import lowering
from resnet_flax.models.lowering import ByDevice, Normalisation

Dtype = Any


def relu(x: Array) -> Array:
    """The positive part; what is no number stays so.

    As a choice between two maps, not as `max(x, 0)`: that is to XLA's CPU compiler a function of
    one map, which it computes again wherever it is read, and with it all that lies before it up to
    the last convolutions. Along a stage's shortcuts that grows with the square of the depth.
    """
    return jnp.where(x <= 0, jnp.zeros((), x.dtype), x)


def activated(
    norm: nn.Module, x: Float[Array, "b h w c"], train: bool, residual: Array | None = None
) -> Float[Array, "b h w c"]:
    """ReLU of a normalisation of `x`, to which `residual` is added before where there is one.

    In training that is one operation, which for its gradient keeps `x` alone (and with a residual
    its own output, which the next layer keeps as well). In evaluation the compiler joins them by
    itself, and the normalisation's own output can be looked at with `capture_intermediates`.

    Args:
      norm: `BatchNorm` or `GroupNorm`.
      x: feature maps.
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
        x: Float[Array, "b h w c"],
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
            return _finish(x * factor + shift, activate, residual).astype(self.dtype)
        if b % self.groups:
            raise ValueError(
                f"a batch of {b} does not divide into {self.groups} groups for batch "
                "normalisation; choose a multiple of the groups as the batch size"
            )
        how = _How(
            self.groups,
            self.epsilon,
            activate,
            self.dtype,
            self.param_dtype,
            lowering.normalisation(),
        )
        about = lax.stop_gradient(running_mean.value)
        y, mean, var = _normalize(how, x, scale, bias, residual, about)
        if not self.is_initializing():
            n = b // self.groups * h * w
            correction = n / max(n - 1, 1) if self.unbiased else 1.0
            keep = self.momentum
            for running, now in ((running_mean, mean), (running_var, var * correction)):
                new = keep * running.value + (1 - keep) * now.mean(0)
                running.value = lax.stop_gradient(new)
        return y


class _How(NamedTuple):
    """What of a training normalisation is no array."""

    groups: int
    epsilon: float
    activate: bool
    dtype: Any
    param_dtype: Any
    ways: ByDevice[Normalisation]

    def cut(self, x: Array) -> Array:
        """`[groups, b / groups, h, w, c]`, in the type that is computed in."""
        return x.astype(self.param_dtype).reshape(self.groups, -1, *x.shape[1:])


OVER = (1, 2, 3)  # examples of a group, and positions


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    how: _How, x: Array, scale: Array, bias: Array, residual: Array | None, about: Array
) -> tuple[Array, Array, Array]:
    """The activations, and `[groups, c]` means and variances of `x`."""
    functions = how.ways.map(lambda way: partial(_normalized, how, way))
    return lowering.call(functions, x, scale, bias, residual, about)


def _normalized(
    how: _How,
    way: Normalisation,
    x: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    about: Array,
) -> tuple[Array, Array, Array]:
    grouped = how.cut(x)
    statistics = {"two_pass": _two_pass, "one_pass": _one_pass}[way.statistics]
    mean, var = statistics(grouped, about)
    factor = lax.rsqrt(var + how.epsilon) * scale
    y = (grouped - _wide(mean)) * _wide(factor) + bias
    y = _finish(y.reshape(x.shape), how.activate, residual).astype(how.dtype)
    return _barrier(way, y), mean, var


def _barrier(way: Normalisation, y: Array) -> Array:
    """`y`, which nobody behind it computes again or takes before it was rounded."""
    return lax.optimization_barrier(y) if way.fusion == "guided" else y


def _two_pass(x: Array, about: Array) -> tuple[Array, Array]:
    del about
    mean = x.mean(OVER)
    return mean, jnp.square(x - _wide(mean)).mean(OVER)


def _one_pass(x: Array, about: Array) -> tuple[Array, Array]:
    # About zero, a mean far from it would leave few digits of the difference.
    x = x - about
    mean = x.mean(OVER)
    return mean + about, jnp.maximum(jnp.square(x).mean(OVER) - jnp.square(mean), 0)


def _wide(statistic: Array) -> Array:
    """`[groups, c]` as `[groups, 1, 1, 1, c]`."""
    return statistic[:, None, None, None]


def _finish(y: Array, activate: bool, residual: Array | None) -> Array:
    if residual is not None:
        y = y + residual
    return relu(y) if activate else y


def _forward(how, x, scale, bias, residual, about):  # type: ignore[no-untyped-def]
    y, mean, var = _normalize(how, x, scale, bias, residual, about)
    # With a residual the sign of what ReLU met cannot be told from x.
    kept = None if residual is None or not how.activate else y
    like = None if residual is None else jnp.zeros((), residual.dtype)
    return (y, mean, var), (x, scale, bias, mean, var, kept, like, about)


def _backward(how, residuals, cotangents):  # type: ignore[no-untyped-def]
    functions = how.ways.map(lambda way: partial(_gradients, how, way))
    gradients = lowering.call(functions, residuals[:-1], cotangents)
    return (*gradients, jnp.zeros_like(residuals[-1]))


def _gradients(how, way, residuals, cotangents):  # type: ignore[no-untyped-def]
    """Of y = (x - mean) * factor + bias, factor = scale / sqrt(var + epsilon), and what follows.

    With u = x - mean, dz what arrives at the normalisation and n the examples of a group times
    its positions: dx = factor * (dz - mean(dz) - u * mean(dz * u) / (var + epsilon)).
    """
    x, scale, bias, mean, var, kept, like = residuals
    dy, dmean, dvar = cotangents
    n = x.size // x.shape[-1] // how.groups
    u = how.cut(x) - _wide(mean)
    inverse = lax.rsqrt(var + how.epsilon)
    factor = inverse * scale
    dz = how.cut(dy)
    if how.activate:
        dz = _where_positive(way, u * _wide(factor) + bias if kept is None else how.cut(kept), dz)
    sums = dz.sum(OVER)
    products = (dz * u).sum(OVER)
    if like is not None:
        # The residual's gradient, which is written in any case, is read again for dx: that takes
        # one map less than to read both of which it is made. It loses nothing: it is dy or zero.
        dz = how.cut(_barrier(way, dz.reshape(x.shape).astype(dy.dtype)))
    # Both statistics have a gradient of their own, though a training step asks for none.
    slope = (2 * dvar - factor * jnp.square(inverse) * products) / n
    level = (dmean - factor * sums) / n
    # The last addition is of two maps, so that it is computed once, see `relu`.
    dx = dz * _wide(factor) + (u * _wide(slope) + _wide(level))
    dresidual = None if like is None else dz.reshape(x.shape).astype(like.dtype)
    return dx.reshape(x.shape).astype(x.dtype), (products * inverse).sum(0), sums.sum(0), dresidual


def _where_positive(way: Normalisation, z: Array, dz: Array) -> Array:
    """`dz` where `z` is positive, else zero."""
    if way.fusion == "guided":
        # A comparison, whose output is a byte, XLA's GPU compiler stores for whoever needs it;
        # this it computes again.
        return dz * jnp.maximum(jnp.sign(z), 0)
    return jnp.where(z > 0, dz, 0)


_normalize.defvjp(_forward, _backward)


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
        x: Float[Array, "b h w c"],
        train: bool,
        activate: bool = False,
        residual: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises, the same in training and evaluation; the rest as in `BatchNorm`."""
        del train
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
        return _finish(y * scale + bias, activate, residual).astype(self.dtype)

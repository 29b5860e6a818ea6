"""Convolution and normalisation modules, and functions that apply the two in sequence."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from resnet_flax import ops
from resnet_flax.errors import UserError
from resnet_flax.ops import BatchNormSpec, ConvSpec, heuristics

Dtype = Any

# Zero-mean normal with variance 2 / (kernel area * output channels): He et al. 2015,
# "Delving Deep into Rectifiers", eq. 14, which keeps the scale of gradients constant over depth.
he_normal: Callable[..., Array] = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution with the parameter `kernel` (HWIO), and `bias` if `use_bias`.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: step between output positions.
      padding: zeros on every side; by default half the dilated kernel, so that an odd kernel at
        stride 1 keeps the size.
      dilation: spacing of the kernel's taps.
      groups: groups of channels (ResNeXt's cardinality).
      use_bias: add a bias; has no effect before a normalisation.
      dtype: type of the computation.
      param_dtype: type of the parameters.
      implementation: see `ResNet`.
    """

    features: int
    kernel_size: Sequence[int] = (3, 3)
    strides: int = 1
    padding: int | None = None
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"

    @property
    def spec(self) -> ConvSpec:
        """The convolution's geometry."""
        ph, pw = (
            self.dilation * (k - 1) // 2 if self.padding is None else self.padding
            for k in self.kernel_size
        )
        strides, dilation = (self.strides,) * 2, (self.dilation,) * 2
        return ConvSpec(strides, ((ph, ph), (pw, pw)), dilation, self.groups)

    def kernel_shape(self, channels: int) -> tuple[int, int, int, int]:
        """The shape of the kernel (HWIO) for an input with this number of channels."""
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the {channels} input and the "
                f"{self.features} output channels of a convolution"
            )
        height, width = self.kernel_size
        return height, width, channels // self.groups, self.features

    @nn.compact
    def parameters(self, channels: int) -> tuple[Array, Array | None]:
        """Declares the kernel and the bias; computes nothing."""
        kernel = self.param("kernel", he_normal, self.kernel_shape(channels), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 features"]:
        """The convolution of `x`, computed in `dtype`."""
        kernel, bias = self.parameters(x.shape[-1])
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = ops.conv2d(x, kernel, *self.spec, implementation=self.implementation)
        return y if bias is None else y + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015), separately for each group of examples.

    In training the batch is split into `groups` equal groups of consecutive examples, and each is
    normalised by its own mean and (biased) variance; the running statistics are updated with the
    groups' average. One group is the usual batch normalisation, over the global batch however it is
    sharded. In evaluation the running statistics are used.

    Statistics, `scale` and `bias` have `param_dtype` (float32), and the statistics are computed in
    it: in bfloat16 a mean over a large batch would lose most of its digits.

    Attributes:
      groups: number of groups; divides the batch.
      momentum: fraction of a running statistic that a step keeps (1 - torch's momentum).
      unbiased: update the running variance with the unbiased variance of a group, as in torch.
      epsilon: added to the variance.
      scale_init: initialiser of `scale`; zeros for the last normalisation of a block where the
        block is to start as the identity.
      dtype: type of the output.
      param_dtype: type of parameters and statistics.
      implementation: see `ResNet`.
    """

    groups: int = 1
    momentum: float = 0.9
    unbiased: bool = False
    epsilon: float = 1e-5
    scale_init: Any = nn.initializers.ones
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def parameters(self, channels: int) -> tuple[Array, Array, nn.Variable, nn.Variable]:
        """Declares scale, bias, and the running mean and variance; computes nothing."""
        shape, dtype = (channels,), self.param_dtype
        return (
            self.param("scale", self.scale_init, shape, dtype),
            self.param("bias", nn.initializers.zeros, shape, dtype),
            self.variable("batch_stats", "mean", jnp.zeros, shape, dtype),
            self.variable("batch_stats", "var", jnp.ones, shape, dtype),
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool,
        activate: bool = False,
        residual: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises by the batch if `train`, updating the running statistics, else by those.

        Then adds `residual`, if there is one, and applies the ReLU if `activate`.
        """
        scale, bias, running_mean, running_var = self.parameters(x.shape[-1])
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * factor
            y = x.astype(self.param_dtype) * ops.wide(factor, x) + ops.wide(shift, x)
            return ops.add_relu(y, activate, residual).astype(self.dtype)
        spec = self.spec(x.shape, activate, heuristics.batch_norm_implementation(shape=x.shape))
        running = lax.stop_gradient((running_mean.value, running_var.value))
        operands = x, scale, bias, residual, running[0]
        y, mean, var = ops.batch_norm(spec, *operands, implementation=self.implementation)
        self._update(spec.update_running(mean, var, running), running_mean, running_var)
        return y

    def of_conv(
        self,
        conv: Conv,
        x: Float[Array, "b h w c"],
        implementations: Any,
        activate: bool,
        residual: Array | None,
    ) -> Float[Array, "b h2 w2 f"]:
        """Convolves and normalises in training as one operation; see `conv_norm`."""
        kernel, _ = conv.parameters(x.shape[-1])
        scale, bias, running_mean, running_var = self.parameters(conv.features)
        positions = ops.output_size(x.shape, kernel.shape, conv.spec)
        spec = self.spec((len(x), *positions, conv.features), activate, implementations)
        running = lax.stop_gradient((running_mean.value, running_var.value))
        y, updated = ops.conv_batch_norm(
            spec, conv.spec, x.astype(conv.dtype), kernel, scale, bias, residual, running
        )
        self._update(updated, running_mean, running_var)
        return y

    def spec(self, shape: Sequence[Any], activate: bool, implementations: Any) -> BatchNormSpec:
        """The static parameters of a normalisation of shape `[b, h, w, c]` in training."""
        b, h, w, _ = shape
        if b % self.groups:
            raise ValueError(
                f"a batch of {b} cannot be divided into {self.groups} groups for batch "
                "normalisation; choose a batch size that is a multiple of the groups"
            )
        n = b // self.groups * h * w
        return BatchNormSpec(
            *(self.groups, self.epsilon, activate, self.dtype, self.param_dtype, implementations),
            self.momentum,
            n / max(n - 1, 1) if self.unbiased else 1.0,
        )

    def _update(self, updated: Any, running_mean: nn.Variable, running_var: nn.Variable) -> None:
        if not self.is_initializing():
            running_mean.value, running_var.value = updated


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018): separately for each example, over groups of channels.

    A replacement for `BatchNorm`: the same parameters, no statistics; `train` has no effect.

    Attributes:
      channel_groups: number of groups (32), at most that of the channels.
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
            raise UserError(f"group normalisation cannot divide {c} channels into {groups} groups")
        scale = self.param("scale", self.scale_init, (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        x = x.astype(self.param_dtype).reshape(b, h, w, groups, c // groups)
        mean = x.mean((1, 2, 4), keepdims=True)
        centred = x - mean
        var = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        y = (centred * lax.rsqrt(var + self.epsilon)).reshape(b, h, w, c)
        y = y * ops.wide(scale, y) + ops.wide(bias, y)
        return ops.add_relu(y, activate, residual).astype(self.dtype)


def _batch_norm(network: Any) -> Callable[..., nn.Module]:
    return partial(
        BatchNorm,
        *(network.ghost_batches, network.norm_momentum, network.norm_unbiased),
        implementation=network.implementation,
    )


def _group_norm(network: Any) -> Callable[..., nn.Module]:
    del network
    return GroupNorm


# By `ResNet.norm`: from a network, whose attributes it may use, to what makes its normalizations.
# That takes `scale_init`, `dtype`, `param_dtype` and `name`; the modules take `(x, train, activate,
# residual)`, see `BatchNorm.__call__`.
NORMS: dict[str, Callable[[Any], Callable[..., nn.Module]]] = {
    "batch": _batch_norm,
    "group": _group_norm,
}

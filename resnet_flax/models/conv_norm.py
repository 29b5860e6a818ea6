"""A convolution, a normalization and an activation in sequence, or as one operation."""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float

from resnet_flax import ops
from resnet_flax.models.layers import BatchNorm, Conv


def norm_act(
    norm: nn.Module,
    x: Float[Array, "b h w c"],
    train: bool,
    residual: Array | None = None,
) -> Float[Array, "b h w c"]:
    """Normalises `x`, adds `residual` if there is one, and applies the ReLU.

    In training this is one operation, which saves only `x` for its gradient (and with a residual
    its output, which the next layer saves too). In evaluation the compiler fuses the steps, and
    `capture_intermediates` can return the normalisation's own output.

    Args:
      norm: `BatchNorm` or `GroupNorm`.
      x: feature maps.
      train: see `BatchNorm`.
      residual: with the shape of `x`.
    """
    if train:
        return norm(x, train, activate=True, residual=residual)
    y = norm(x, train)
    return ops.relu(y if residual is None else y + residual)


def conv_norm(
    conv: Conv,
    norm: nn.Module,
    x: Float[Array, "b h w c"],
    train: bool,
    activate: bool = False,
    shortcut: Callable[[], Array | None] = lambda: None,
) -> Float[Array, "b h2 w2 f"]:
    """A convolution and a normalisation of its output, fused in training if that is faster.

    If they are fused, the convolution's output need not be saved for the gradient, or not even be
    written, and `capture_intermediates` does not return it.

    Args:
      conv: the convolution.
      norm: `BatchNorm` or `GroupNorm`.
      x: feature maps.
      train: see `BatchNorm`.
      activate: apply the ReLU at the end.
      shortcut: returns what is added before the ReLU, with the shape of the output, or None. It is
        called after the convolution: with another order of the same operations XLA rounds
        differently, and continued runs would not be reproduced bit for bit.
    """
    fusible = isinstance(norm, BatchNorm) and norm.implementation == conv.implementation == "auto"
    if train and fusible and not conv.use_bias:
        implementations = ops.fused(
            x.shape,
            conv.kernel_shape(x.shape[-1]),
            conv.spec,
            dtype=conv.dtype,
            param_dtype=conv.param_dtype,
            groups=norm.groups,
        )
        if implementations is not None:
            return norm.of_conv(conv, x, implementations, activate, shortcut())
    y, residual = conv(x), shortcut()
    return norm_act(norm, y, train, residual) if activate else norm(y, train, residual=residual)

"""A convolution and the batch normalisation of its output, fused into one operation."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array

from resnet_flax.ops import heuristics
from resnet_flax.ops.dispatch import BatchNormImplementation, ByDevice
from resnet_flax.ops.fused_1x1 import conv_batch_norm_1x1
from resnet_flax.ops.fused_3x3 import conv_batch_norm_3x3
from resnet_flax.ops.spec import BatchNormSpec, ConvSpec, NormalizedConv, is_symbolic, output_size


def fused(
    x: Sequence[Any],
    kernel: Sequence[Any],
    spec: ConvSpec,
    *,
    dtype: Any,
    param_dtype: Any,
    groups: int = 1,
) -> ByDevice[BatchNormImplementation] | None:
    """Implementations that fuse the two; the only place that decides whether to fuse.

    Args:
      x: shape of the convolution's input, NHWC.
      kernel: shape of its kernel, HWIO.
      spec: of the convolution.
      dtype: of the computation.
      param_dtype: of the kernel.
      groups: number of groups of examples that are normalised separately.

    Returns:
      The implementations, if one is fused on some kind of device; otherwise None.
    """
    if is_symbolic(x):
        return None
    height, width = output_size(x, kernel, spec)
    conv = NormalizedConv(height * width, kernel, spec, dtype, x[0], param_dtype)
    chosen = heuristics.batch_norm_implementation(conv, groups)
    one = chosen.any(lambda it: (it.conv_bn_1x1, it.conv_bn_3x3) != ("unfused", "unfused"))
    # Without images there is nothing to fuse, and a kernel's grid would be empty.
    return chosen if one and x[0] else None


def conv_batch_norm(
    norm_spec: BatchNormSpec,
    conv_spec: ConvSpec,
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    residual: Array | None,
    running: tuple[Array, Array],
) -> tuple[Array, tuple[Array, Array]]:
    """Convolution, training batch normalisation, addition of `residual` and ReLU, in one operation.

    Args:
      norm_spec: of the normalisation; its implementations are what `fused` returned.
      conv_spec: of the convolution.
      x: its input `[b, h, w, c]`.
      kernel: `[kh, kw, c, o]`, which is cast to the type of `x`.
      scale: of the normalisation, `[o]`.
      bias: of the normalisation, `[o]`.
      residual: with the shape of the output, or None.
      running: running means and variances before the batch, `[o]`.

    Returns:
      The activations, and the running means and variances after the batch.
    """
    if norm_spec.implementations.any(lambda it: it.conv_bn_3x3 != "unfused"):
        (y, _, _), updated = conv_batch_norm_3x3(
            norm_spec, conv_spec, x, kernel, scale, bias, residual, running
        )
        return y, updated
    kernel = kernel.astype(x.dtype)
    y, mean, var = conv_batch_norm_1x1(
        norm_spec, conv_spec.strides, x, kernel, scale, bias, residual, running[0]
    )
    return y, norm_spec.update_running(mean, var, running)

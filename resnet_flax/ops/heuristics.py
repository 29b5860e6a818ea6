"""The choice of implementations of convolution, pooling and normalisation, by device and shape.

Parameters and results do not depend on it (tests/ops); time and memory do. The choice between kinds
of device is made when a program is lowered, so ahead-of-time compilation for another device is
right too; that for oneDNN on a CPU, or for a single GPU, when it is traced. The measurements are in
docs/decisions.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from resnet_flax.ops import dispatch
from resnet_flax.ops.dispatch import (
    BatchNormImplementation,
    ByDevice,
    ConvImplementation,
    PoolImplementation,
    everywhere,
    overridden,
)
from resnet_flax.ops.spec import (
    ConvSpec,
    NormalizedConv,
    Pair,
    is_pointwise,
    is_symbolic,
    output_size,
)


def conv_implementation(
    x: Sequence[Any], kernel: Sequence[Any], spec: ConvSpec, dtype: Any = np.float32
) -> ByDevice[ConvImplementation]:
    """The implementation of a convolution for each kind of device.

    The others depend on numbers of positions and images, so if a dimension is symbolic, it is XLA's
    own; and likewise below.

    Args:
      x: shape of the input, NHWC.
      kernel: shape of the kernel, HWIO.
      spec: its geometry.
      dtype: of the computation.
    """
    if is_symbolic(x):
        return everywhere(ConvImplementation())
    cpu = _conv_on_cpu(x, kernel, spec)
    if dispatch.current_target().onednn:
        cpu = _conv_by_onednn(cpu, kernel, spec, np.dtype(dtype).itemsize == 2)
    chosen = ByDevice(cpu, _conv_on_gpu(kernel, spec), ConvImplementation())
    return chosen.map(lambda it: _applicable(it, kernel, spec))


def _conv_on_gpu(kernel: Sequence[Any], spec: ConvSpec) -> ConvImplementation:
    # As a convolution, its kernel would be transposed, in float32 and in bfloat16, which takes
    # longer than the products. cuDNN pads three channels to eight in copies, and for few channels
    # takes several times as long as reading and writing the maps.
    if is_pointwise(kernel, spec):
        return ConvImplementation("dot", "dot", "dot")
    if _space_to_depth_applies(kernel, spec):
        return ConvImplementation("space_to_depth", "native", "space_to_depth")
    if _width_to_channels_applies(kernel, spec) and math.prod(kernel[2:]) <= 16 * 16:
        return ConvImplementation("width_to_channels", "width_to_channels", "width_to_channels")
    return ConvImplementation()


def _conv_on_cpu(x: Sequence[Any], kernel: Sequence[Any], spec: ConvSpec) -> ConvImplementation:
    height, width, channels, features = kernel
    if is_pointwise(kernel, spec):
        return ConvImplementation("dot", "dot", "dot")
    # In a loop (a scan over blocks, gradient accumulation, several steps to a dispatch) a
    # convolution that is not canonical is 8 to 40 times slower on XLA's CPU backend.
    forward, input_gradient, kernel_gradient = "conv", "canonical", "canonical"
    if channels <= 4 and spec.groups == 1:
        kernel_gradient = "row_im2col"
    if not (_dense(spec) and (height, width) == (3, 3)):
        return ConvImplementation(forward, input_gradient, kernel_gradient)
    rows, columns = output_size(x, kernel, spec)
    strided = spec.strides != (1, 1)
    if strided:
        input_gradient = "polyphase"
    if channels * features >= (16 * 32 if strided else 256 * 256):
        kernel_gradient = "tap_matmul"
    if channels * features >= 256 * 256 and rows * columns <= 64:
        forward, input_gradient = "tap_matmul", "tap_matmul"
    if _winograd_pays(kernel, spec, (rows, columns)):
        if min(channels, features) >= 64:
            forward, input_gradient = "winograd", "winograd"
        if min(channels, features) >= 16:
            kernel_gradient = "winograd"
    return ConvImplementation(forward, input_gradient, kernel_gradient)


def _conv_by_onednn(
    chosen: ConvImplementation, kernel: Sequence[Any], spec: ConvSpec, half: bool
) -> ConvImplementation:
    """The best choice if XLA's convolutions are oneDNN's; `half` for 16-bit types."""
    if chosen.forward == "dot":
        return chosen
    fewest, strided = min(kernel[2:]), spec.strides != (1, 1)
    if chosen.kernel_gradient == "canonical":
        # As a convolution, its kernel would be as large as a map, with the batch as channels: in
        # bfloat16, with two or four channels, oneDNN's result is wrong (JAX 0.12).
        rather = "row_im2col" if spec.groups == 1 else "float32"  # equivalent, in float32
        chosen = chosen._replace(kernel_gradient=rather)
    if not _dense(spec):
        return chosen
    by_winograd = chosen.forward == "winograd"
    if half or fewest < 128 or strided:
        chosen = chosen._replace(forward="conv")
    if by_winograd and fewest < 128:
        chosen = chosen._replace(input_gradient="canonical")
    if half:
        chosen = chosen._replace(input_gradient="polyphase" if strided else "canonical")
    if half and (strided or fewest >= 128):
        chosen = chosen._replace(kernel_gradient="row_im2col")
    return chosen


def _winograd_pays(kernel: Sequence[Any], spec: ConvSpec, output: Pair) -> bool:
    """Decided by the work for one image, so that rounding does not depend on the batch size."""
    rows, columns = output
    positions = rows * columns
    products = 36 * -(-rows // 4) * -(-columns // 4)
    return (
        _winograd_applies(kernel, spec)
        and products <= 6 * positions  # direct: 9; small odd maps waste parts of tiles
        and math.prod(kernel) * positions >= 1e6  # below, compilation costs more than it saves
        and positions <= 64 * 64  # maps grow 2.25 times; not measured beyond
    )


def _winograd_applies(kernel: Sequence[Any], spec: ConvSpec) -> bool:
    return tuple(kernel[:2]) == (3, 3) and spec.strides == (1, 1) and _dense(spec)


def _dense(spec: ConvSpec) -> bool:
    return spec.groups == 1 and spec.dilation == (1, 1)


def _space_to_depth_applies(kernel: Sequence[Any], spec: ConvSpec) -> bool:
    return _dense(spec) and spec.strides != (1, 1) and kernel[2] <= 4


def folded_columns(columns: int, features: int) -> int:
    """How many columns `width_to_channels` folds into one: up to 64 output channels."""
    return math.gcd(columns, max(1, 64 // features))


def _width_to_channels_applies(kernel: Sequence[Any], spec: ConvSpec) -> bool:
    reach = kernel[1] // 2
    along = kernel[1] % 2 == 1 and spec.padding[1] == (reach, reach)
    return along and spec.strides == (1, 1) and _dense(spec)


def _applicable(
    chosen: ConvImplementation, kernel: Sequence[Any], spec: ConvSpec
) -> ConvImplementation:
    """The chosen implementations, or those that `dispatch.override` names if they apply."""
    possible = {
        "dot": is_pointwise(kernel, spec),
        "tap_matmul": spec.groups == 1,
        "row_im2col": spec.groups == 1,
        "polyphase": _dense(spec),
        "space_to_depth": _space_to_depth_applies(kernel, spec),
        "width_to_channels": _width_to_channels_applies(kernel, spec),
        "winograd": _winograd_applies(kernel, spec),
    }
    wanted = overridden(chosen)._asdict()
    return chosen._replace(
        **{part: name for part, name in wanted.items() if possible.get(name, True)}
    )


def batch_norm_implementation(
    conv: NormalizedConv | None = None, groups: int = 1, shape: Sequence[Any] = ()
) -> ByDevice[BatchNormImplementation]:
    """The implementation of batch normalisation for each kind of device.

    Args:
      conv: the convolution whose output is normalised, if any.
      groups: number of groups of examples that are normalised separately.
      shape: of what is normalised, if it is known.
    """
    plain, on_gpu = BatchNormImplementation(), BatchNormImplementation("one_pass", "guided")
    if is_symbolic(shape):
        return everywhere(plain)
    if conv is not None and _fused_1x1_pays(conv):
        on_gpu = on_gpu._replace(conv_bn_1x1="fused")
    if conv is not None and _triton_pays(conv):
        on_gpu = on_gpu._replace(conv_bn_3x3="triton")
    chosen = ByDevice(plain, on_gpu, plain).map(overridden)
    if conv is None or groups > 1 or not conv.pointwise:
        chosen = chosen.map(lambda it: it._replace(conv_bn_1x1="unfused"))
    if conv is None or groups > 1 or not _triton_applies(conv):
        chosen = chosen.map(lambda it: it._replace(conv_bn_3x3="unfused"))
    return chosen


def _fused_1x1_pays(conv: NormalizedConv) -> bool:
    channels, features = conv.kernel[2:]
    return (
        conv.pointwise
        and features >= 4 * channels
        # Products with the channels-by-channels matrix must be cheap compared with those of
        # positions.
        and 4 * conv.positions >= channels
        # GPUs round float32 products to TF32, and the computed mean would not be that of the
        # output.
        and np.dtype(conv.dtype).itemsize == 2
    )


def _triton_applies(conv: NormalizedConv) -> bool:
    return (
        tuple(conv.kernel[:2]) == (3, 3)
        and conv.spec.padding == ((1, 1), (1, 1))
        and _dense(conv.spec)
        and conv.kernel[3] in (16, 32, 64)
        and conv.positions % 64 == 0  # so that programs get equal parts
    )


def _triton_pays(conv: NormalizedConv) -> bool:
    return (
        dispatch.current_target().single_gpu  # each of several GPUs would get the complete batch
        and _triton_applies(conv)
        # 32x32 of 16 channels, 16x16 of 32, 8x8 of 64: others were not measured, and beyond that or
        # this batch a program needs several iterations, for which there is not enough shared
        # memory.
        and conv.positions * conv.kernel[3] ** 2 <= 2**18
        and conv.batch <= 256
        and np.dtype(conv.dtype).name == "bfloat16"
        and np.dtype(conv.param_dtype).name == "float32"
        and dispatch.has_triton()
    )


def pool_implementation(shape: Sequence[Any]) -> ByDevice[PoolImplementation]:
    """The implementation of max pooling of maps of this shape for each kind of device."""
    if is_symbolic(shape):
        return everywhere(PoolImplementation())
    separable = PoolImplementation("separable")
    return ByDevice(separable, PoolImplementation("indexed"), PoolImplementation("native")).map(
        overridden
    )

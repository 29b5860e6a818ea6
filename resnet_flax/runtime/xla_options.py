"""Compiler options for XLA other than its defaults, by device and program."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_flax.runtime import compilation_cache

Flags = dict[str, bool | str]

# On x86, JAX's wheels contain oneDNN, Intel's library of convolutions and products. XLA uses it for
# what its other library, YNNPACK, does not compute; that is set to sums only.
CUSTOM_CALL = "xla_cpu_experimental_onednn_custom_call"
ONEDNN: Flags = {
    CUSTOM_CALL: True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


class Options(NamedTuple):
    """Options of a compiled program other than XLA's defaults.

    Attributes:
      flags: `compiler_options` of `jax.jit`.
      onednn: whether they turn on oneDNN. JAX cannot cache such programs on disk, and warns when it
        tries: call `compilation_cache.stop` before compiling.
      single_gpu: whether the program runs on one GPU, of a kind that `ops.gpu_kernels` were
        measured on.
    """

    flags: Flags
    onednn: bool = False
    single_gpu: bool = False


# GPUs with enough shared memory for `ops.gpu_kernels`.
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")

# For smaller images, compiling takes about as much time on each start as it saves.
LEAST = 32 * 32
# For larger images inference gains nothing.
MOST = 64 * 64


def options(
    platform: str,
    image_shape: Sequence[int],
    dtype: Any,
    *,
    training: bool = True,
    devices: Sequence[Any] = (),
) -> Options | None:
    """The options to compile a program with, other than XLA's defaults.

    On a CPU they use oneDNN for convolutions and products, which makes training 10 % (ResNet-18) to
    40 % (ResNet-20) faster; docs/decisions.md. Options that XLA_FLAGS sets are not changed.

    Args:
      platform: of the program, see `jax.default_backend`.
      image_shape: height and width first.
      dtype: of the computation.
      training: whether the program is part of training (its evaluation too), or inference only.
      devices: `jax.Device`s that the program runs on, if known.

    Returns:
      None if XLA's defaults are as good, or oneDNN is unavailable or lacks the operations.
    """
    if len(devices) == 1 and devices[0].device_kind.startswith(HOPPER):
        return Options({}, single_gpu=True)
    pixels = math.prod(image_shape[:2])
    pays = pixels >= LEAST and (training or pixels < MOST)
    said = any(name in os.environ.get("XLA_FLAGS", "") for name in ONEDNN)
    if platform != "cpu" or not pays or said or not has_onednn(np.dtype(dtype).name):
        return None
    return Options(dict(ONEDNN), onednn=True)


@functools.cache
def has_onednn(dtype: str) -> bool:
    """Whether XLA accepts the options, and then uses oneDNN for convolutions of this type.

    For bfloat16 this depends on the processor. Checked once per process, by compiling a small
    program.

    Args:
      dtype: name of the type of the computation.
    """
    if dtype not in ("float32", "bfloat16"):  # no other was measured
        return False
    x = jax.ShapeDtypeStruct((8, 32, 32, 16), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), dtype)

    def convolve(x: Any, kernel: Any) -> Any:
        form, pad = ("NHWC", "HWIO", "NHWC"), ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=form)

    kept_from = compilation_cache.stop()
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            lowered = jax.jit(convolve, compiler_options=ONEDNN).lower(x, kernel)
            return "__onednn" in (lowered.compile().as_text() or "")
    except jax.errors.JaxRuntimeError:  # no such option, or no such value
        return False
    finally:
        compilation_cache.resume(kept_from)

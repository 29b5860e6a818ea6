"""What XLA's compiler is told beyond its defaults, by device and by what is computed."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_flax.runtime import compilation_cache

Flags = dict[str, bool | str]

# On x86 JAX's wheels hold oneDNN, Intel's library of convolutions and products. XLA leaves to it
# what its other library, YNNPACK, does not take, which is to be sums alone.
CUSTOM_CALL = "xla_cpu_experimental_onednn_custom_call"
ONEDNN: Flags = {
    CUSTOM_CALL: True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}


class Options(NamedTuple):
    """What a program is compiled with beyond XLA's defaults.

    Attributes:
      flags: `compiler_options` of `jax.jit`.
      onednn: whether they are those for oneDNN. JAX cannot keep such programs between runs, and
        warns when it tries: whoever compiles calls `compilation_cache.stop` first.
      single_gpu: whether all of it runs on one GPU that `ops.gpu_kernels` were measured on.
    """

    flags: Flags
    onednn: bool = False
    single_gpu: bool = False


# GPUs with as much shared memory as `ops.gpu_kernels` take.
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")

# Programs on smaller images take about as long to compile, each time, as is saved by them.
LEAST = 32 * 32
# From here on inference gains nothing.
MOST = 64 * 64


def options(
    platform: str,
    image_shape: Sequence[int],
    dtype: Any,
    *,
    training: bool = True,
    devices: Sequence[Any] = (),
) -> Options | None:
    """What a program is to be compiled with beyond XLA's defaults.

    On a CPU convolutions and products by oneDNN, with which networks train by a tenth (ResNet-18)
    to two fifths (ResNet-20) faster; docs/decisions.md. Where XLA_FLAGS sets those options they
    are left as they are.

    Args:
      platform: that the program is for, see `jax.default_backend`.
      image_shape: height and width first.
      dtype: of the computation.
      training: whether the program is one of training (its evaluation too), or inference alone.
      devices: `jax.Device`s that the program runs on, where they are known.

    Returns:
      None where XLA's defaults are as good, or oneDNN or what it does is not there.
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
    """Whether XLA takes the options, and convolutions of this type are oneDNN's then.

    In bfloat16 they are only on processors that multiply it. Asked once a process: a small program
    is compiled.

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

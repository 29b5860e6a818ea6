"""What XLA's compiler is told beyond its defaults, by device and by what is computed."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np

Flags = dict[str, bool | str]

# On x86 JAX's wheels hold oneDNN, Intel's library of convolutions and products. XLA leaves to it
# what its other library, YNNPACK, does not take, which is to be sums alone.
CUSTOM_CALL = "xla_cpu_experimental_onednn_custom_call"
ONEDNN: Flags = {
    CUSTOM_CALL: True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

# Seconds of compilation from which on JAX keeps a program. Of one with oneDNN it would try, and
# warn of std::bad_alloc.
KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"


class Options(NamedTuple):
    """What a program is compiled with beyond XLA's defaults.

    Attributes:
      flags: `compiler_options` of `jax.jit`.
      one_gpu: whether all of it runs on one GPU that `models.kernels` were measured on.
    """

    flags: Flags
    one_gpu: bool = False


_traced_for: ContextVar[Options | None] = ContextVar("traced_for", default=None)

# GPUs with as much shared memory as `models.kernels` take.
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
    """What `jit` is told of a program beyond XLA's defaults.

    On a CPU convolutions and products by oneDNN, with which networks train by a tenth (ResNet-18)
    to two fifths (ResNet-20) faster; docs/decisions.md. JAX cannot keep such programs between runs,
    so that once there are some, it keeps nothing more that this process compiles. Where XLA_FLAGS
    speaks of those options they are left as they are.

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
        return Options({}, one_gpu=True)
    pixels = math.prod(image_shape[:2])
    pays = pixels >= LEAST and (training or pixels < MOST)
    said = any(name in os.environ.get("XLA_FLAGS", "") for name in ONEDNN)
    if platform != "cpu" or not pays or said or not _does(np.dtype(dtype).name):
        return None
    jax.config.update(KEPT_FROM, float("inf"))
    return Options(dict(ONEDNN))


def jit(function: Callable[..., Any], options: Options | None, **keywords: Any) -> Any:
    """`jax.jit` with the options, and with convolutions computed as is best with them.

    Args:
      function: what to compile. With options its program cannot be part of another.
      options: see `options`.
      keywords: see `jax.jit`.
    """
    if options is None:
        return jax.jit(function, **keywords)

    @functools.wraps(function)
    def traced(*arguments: Any, **named: Any) -> Any:
        token = _traced_for.set(options)
        try:
            return function(*arguments, **named)
        finally:
            _traced_for.reset(token)

    # A partial has no name, for which JAX would take this function's.
    whole = function.func if isinstance(function, functools.partial) else function
    traced.__name__ = getattr(whole, "__name__", type(whole).__name__)
    return jax.jit(traced, compiler_options=options.flags or None, **keywords)


def traced_for_onednn() -> bool:
    """Whether what is traced here is compiled for oneDNN, or all is, as XLA_FLAGS says."""
    all_is = f"{CUSTOM_CALL}=true" in os.environ.get("XLA_FLAGS", "")
    options = _traced_for.get()
    return all_is or (options is not None and CUSTOM_CALL in options.flags)


def traced_for_one_gpu() -> bool:
    """Whether what is traced here is compiled for one GPU alone, see `Options`."""
    options = _traced_for.get()
    return options is not None and options.one_gpu


@functools.cache
def has_triton() -> bool:
    """Whether this JAX holds Pallas' Triton backend, which is to go one day."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return False
    return hasattr(triton, "CompilerParams")


@functools.cache
def _does(dtype: str) -> bool:
    """Whether XLA takes the options, and convolutions of this type are oneDNN's then.

    In bfloat16 they are only on processors that multiply it.
    """
    if dtype not in ("float32", "bfloat16"):  # no other was measured
        return False
    x = jax.ShapeDtypeStruct((8, 32, 32, 16), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), dtype)

    def convolve(x: Any, kernel: Any) -> Any:
        form, pad = ("NHWC", "HWIO", "NHWC"), ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=form)

    before = getattr(jax.config, KEPT_FROM)
    jax.config.update(KEPT_FROM, float("inf"))
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            lowered = jax.jit(convolve, compiler_options=ONEDNN).lower(x, kernel)
            return "__onednn" in (lowered.compile().as_text() or "")
    except jax.errors.JaxRuntimeError:  # no such option, or no such value
        return False
    finally:
        jax.config.update(KEPT_FROM, before)

"""What XLA's compiler is told beyond its defaults, by device and by what is computed."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np

Options = dict[str, bool | str]

# On x86 JAX's wheels hold oneDNN, Intel's library of convolutions and products. XLA leaves to it
# what its other library, YNNPACK, does not take, which is to be sums alone.
ONEDNN: Options = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

_traced_for_onednn: ContextVar[bool] = ContextVar("traced_for_onednn", default=False)

# Programs on smaller images take about as long to compile, each time, as is saved by them.
LEAST = 32 * 32
# From here on inference gains nothing.
MOST = 64 * 64


def options(platform: str, image_shape: Sequence[int], *, training: bool = True) -> Options | None:
    """`compiler_options` for `jax.jit`, for a program that is worth being compiled anew each time.

    On a CPU convolutions and products by oneDNN, with which networks train by a tenth (ResNet-18)
    to two fifths (ResNet-20) faster; docs/decisions.md. JAX cannot keep such programs between runs,
    so that once there are some, it keeps nothing more that this process compiles. Where XLA_FLAGS
    speaks of those options they are left as they are.

    Args:
      platform: that the program is for, see `jax.default_backend`.
      image_shape: height and width first.
      training: whether the program is one of training, or inference alone.

    Returns:
      None where XLA's defaults are as good, or oneDNN is not there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    pixels = math.prod(image_shape[:2])
    pays = pixels >= LEAST and (training or pixels < MOST)
    if platform != "cpu" or not pays or any(name in flags for name in ONEDNN):
        return None
    return dict(ONEDNN) if _has_onednn() else None


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
    def traced(*arguments: Any) -> Any:
        token = _traced_for_onednn.set(True)
        try:
            return function(*arguments)
        finally:
            _traced_for_onednn.reset(token)

    # A partial has no name, and one that is wrapped has JAX look for one in vain.
    named = function.func if isinstance(function, functools.partial) else function
    traced.__name__ = named.__name__
    return jax.jit(traced, compiler_options=options, **keywords)


def traced_for_onednn() -> bool:
    """Whether what is traced here is compiled for oneDNN."""
    return _traced_for_onednn.get()


@functools.cache
def _has_onednn() -> bool:
    """Whether XLA takes the options and its convolutions are oneDNN's then."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    # Such a program cannot be serialised: JAX would try, and warn of std::bad_alloc.
    jax.config.update(name, float("inf"))
    found = "__onednn" in _compiled(ONEDNN)
    if not found:
        jax.config.update(name, before)
    return found


def _compiled(options: Options) -> str:
    """A convolution as the CPU's compiler leaves it; empty where it does not take the options."""
    x = jax.ShapeDtypeStruct((8, 32, 32, 16), np.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), np.float32)

    def convolve(x: Any, kernel: Any) -> Any:
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form)

    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            lowered = jax.jit(convolve, compiler_options=options).lower(x, kernel)
            return lowered.compile().as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""

"""Compiles programs with XLA options, and traces them for the resulting target."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from resnet_flax import ops
from resnet_flax.runtime import compilation_cache
from resnet_flax.runtime.xla_options import Options


def jit(function: Callable[..., Any], options: Options | None, **keywords: Any) -> Any:
    """`jax.jit` with the options, and with the implementations that are best with them.

    If the options are for oneDNN, JAX's compilation cache is off from here on in this process.

    Args:
      function: what to compile. With options, its program cannot be part of another.
      options: see `xla_options.options`.
      keywords: see `jax.jit`.
    """
    if options is None:
        return jax.jit(function, **keywords)
    if options.onednn:
        compilation_cache.stop()

    @functools.wraps(function)
    def traced(*arguments: Any, **named: Any) -> Any:
        with ops.target(onednn=options.onednn, single_gpu=options.single_gpu):
            return function(*arguments, **named)

    # A partial has no name, and JAX would use this function's instead.
    whole = function.func if isinstance(function, functools.partial) else function
    traced.__name__ = getattr(whole, "__name__", type(whole).__name__)
    return jax.jit(traced, compiler_options=options.flags or None, **keywords)

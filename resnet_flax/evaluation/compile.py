"""Programs compiled with XLA's options, and traced for what these make of the target."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from resnet_flax import ops
from resnet_flax.runtime import compilation_cache
from resnet_flax.runtime.xla_options import Options


def jit(function: Callable[..., Any], options: Options | None, **keywords: Any) -> Any:
    """`jax.jit` with the options, and with operations computed as is best with them.

    Where the options are for oneDNN, JAX keeps nothing more that this process compiles.

    Args:
      function: what to compile. With options its program cannot be part of another.
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

    # A partial has no name, for which JAX would take this function's.
    whole = function.func if isinstance(function, functools.partial) else function
    traced.__name__ = getattr(whole, "__name__", type(whole).__name__)
    return jax.jit(traced, compiler_options=options.flags or None, **keywords)

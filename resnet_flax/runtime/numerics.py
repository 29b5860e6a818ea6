"""JAX's settings that change numbers."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """A context in which those settings are JAX's defaults, whatever the environment says.

    So what a run computes depends on its config only. `JAX_ENABLE_X64` would make random integers
    of other draws, `JAX_DEFAULT_PRNG_IMPL` and `JAX_THREEFRY_PARTITIONABLE` other random numbers.
    """
    with (
        jax.enable_x64(False),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
    ):
        yield

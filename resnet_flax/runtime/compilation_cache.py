"""The cache of compiled programs on disk."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

SETTINGS = {
    "jax_compilation_cache_max_size": 4 * 2**30,
    "jax_persistent_cache_min_compile_time_secs": 0.3,
}


def enable() -> None:
    """Turns on JAX's compilation cache on disk; for a command's start.

    In `~/.cache/resnet_flax/compiled` (or under XDG_CACHE_HOME if set), at most 4 GiB, least
    recently used programs evicted first. JAX's own settings take precedence:
    JAX_COMPILATION_CACHE_DIR sets another directory, JAX_ENABLE_COMPILATION_CACHE=false turns it
    off.
    """
    config: Any = jax.config  # its attributes are not declared
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = cache / "resnet_flax" / "compiled" / _machine()
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no writable home: nothing is cached
        return
    config.update("jax_compilation_cache_dir", str(place))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            config.update(name, value)


# JAX's option: seconds of compilation from which a program is cached.
KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"


def stop() -> float:
    """Stops caching programs that this process compiles; returns the argument of `resume`."""
    config: Any = jax.config
    before: float = getattr(config, KEPT_FROM)
    config.update(KEPT_FROM, float("inf"))
    return before


def resume(before: float) -> None:
    """Undoes `stop`, which returned `before`."""
    config: Any = jax.config
    config.update(KEPT_FROM, before)


def _machine() -> str:
    """A name for the kind of processor: code with another one's instructions would not run.

    Machines of different kinds may share a home, and JAX's own key does not distinguish them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    about = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    digest = hashlib.sha256("\n".join(sorted(about or lines)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"

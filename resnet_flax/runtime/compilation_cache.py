"""Compiled programs kept between runs."""

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
    """Lets JAX keep what it compiles on the disk, and find it there; for a command's start.

    In `~/.cache/resnet_flax/compiled` (under XDG_CACHE_HOME where that is set), at most 4 GiB, the
    longest unused going first. JAX's own settings go before: JAX_COMPILATION_CACHE_DIR says
    another place, JAX_ENABLE_COMPILATION_CACHE=false says none.
    """
    config: Any = jax.config  # whose attributes are not declared
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = cache / "resnet_flax" / "compiled" / _machine()
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to: compiled again each time
        return
    config.update("jax_compilation_cache_dir", str(place))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            config.update(name, value)


# Seconds of compilation from which on JAX keeps a program.
KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"


def stop() -> float:
    """Has JAX keep nothing more that this process compiles; returns what `resume` takes."""
    config: Any = jax.config
    before: float = getattr(config, KEPT_FROM)
    config.update(KEPT_FROM, float("inf"))
    return before


def resume(before: float) -> None:
    """Undoes `stop`, which returned `before`."""
    config: Any = jax.config
    config.update(KEPT_FROM, before)


def _machine() -> str:
    """A name for processors of one kind: code for another's instructions would not run here.

    Homes are shared between unlike machines, and JAX's own key does not tell them apart.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    about = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    digest = hashlib.sha256("\n".join(sorted(about or lines)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"

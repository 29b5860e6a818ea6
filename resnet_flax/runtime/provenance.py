"""Provenance of measured numbers, for their files."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from resnet_flax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def provenance() -> dict[str, Any]:
    """Commit (with '+' if the tree differs from it, except in results/), device and versions.

    The commit is empty outside a checkout, where the version of this package identifies it.
    """
    device = jax.devices()[0]
    # Earlier results are not part of the program.
    changed = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return {
        "commit": _git("rev-parse", "HEAD") + "+" * bool(changed),
        "device": f"{jax.device_count()} x {device.device_kind} ({platform.machine()})",
        "versions": {
            "resnet_flax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _git(*arguments: str) -> str:
    """Git's output for the tree that contains this package; empty outside one."""
    here = Path(__file__)

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=here.parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # If it is installed in an environment inside another repository, that commit is not its own.
    if ask("ls-files", "--error-unmatch", here.name) is None:
        return ""
    return ask(*arguments) or ""

"""One config with several seeds: mean and deviation instead of a lucky run."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from resnet_flax.config import flatten, resolve
from resnet_flax.train.interrupt import Interruption
from resnet_flax.train.loop import Stopped, train

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def sweep(
    config: ml_collections.ConfigDict,
    seeds: Sequence[int],
    workdir: Path,
    stop: Interruption | None = None,
) -> dict[str, Any]:
    """Trains with every seed, in `workdir/seed<N>`; what is finished there is not trained again.

    Args:
      config: the experiment; its own seed is not used.
      seeds: each gives one run; all of them are reported.
      workdir: holds a directory a seed.
      stop: see `train`.

    Returns:
      The error rates (%) of the last step, their mean and standard deviation (n - 1), and where
      they come from.
    """
    errors, losses = {}, {}
    for seed in seeds:
        one = config.copy_and_resolve_references()
        one.seed = seed
        result = train(one, workdir / f"seed{seed}", stop)
        if stop is not None and stop.signal:  # too late for that run, not for the next
            raise Stopped(f"stopped by {stop.signal.name} behind seed {seed}", stop.signal)
        errors[str(seed)] = round(100 * result.error, 4)
        losses[str(seed)] = round(result.loss, 6)
    values = list(errors.values())
    # Neither the seed, which differs, nor where the data lies on this machine.
    apart = ("seed", "data.data_dir")
    fixed = {key: value for key, value in flatten(resolve(config)).items() if key not in apart}
    return {
        "split": config.data.eval_split,
        "error_percent": errors,
        "loss": losses,
        "n": len(values),
        "mean": round(statistics.mean(values), 4),
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "max": max(values),
        **provenance(),
        "config": fixed,
    }


def provenance() -> dict[str, Any]:
    """Commit (with '+' where the tree differs from it, results/ aside), device and versions."""
    device = jax.devices()[0]
    # What was measured before is no part of the program.
    changed = _git("status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return {
        "commit": _git("rev-parse", "HEAD") + "+" * bool(changed),
        "device": f"{jax.device_count()} x {device.device_kind} ({platform.machine()})",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _git(*arguments: str) -> str:
    """Git's answer about the tree this package lies in; empty outside one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result where people and tests read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")

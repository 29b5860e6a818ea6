"""One config with several seeds: the mean and standard deviation of the error."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from resnet_flax.config import flatten, resolve
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.training.loop import train
from resnet_flax.training.outputs import claimed
from resnet_flax.training.session import Interrupted


def sweep(
    config: ml_collections.ConfigDict,
    seeds: Sequence[int],
    workdir: Path,
    stop: SignalHandler | None = None,
) -> dict[str, Any]:
    """Trains with every seed, in `workdir/seed<N>`; finished runs are not trained again.

    Args:
      config: the experiment; its own seed is not used.
      seeds: each gives one run; all of them are reported.
      workdir: gets one directory per seed.
      stop: see `train`.

    Returns:
      The error rates (%) after the last step, their mean and standard deviation (n - 1), and their
      provenance.
    """
    errors, losses = {}, {}
    with claimed(workdir):
        for seed in seeds:
            one = config.copy_and_resolve_references()
            one.seed = seed
            result = train(one, workdir / f"seed{seed}", stop)
            if stop is not None and stop.signal:  # it came after that run's last step
                raise Interrupted(f"stopped by {stop.signal.name} after seed {seed}", stop.signal)
            errors[str(seed)] = round(100 * result.error, 4)
            losses[str(seed)] = round(result.loss, 6)
    values = list(errors.values())
    # Neither the seed, which differs, nor the data's directory on this machine.
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

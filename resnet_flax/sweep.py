"""One config with several seeds: the mean and standard deviation of the error."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from resnet_flax.apply.experiment import run_experiment
from resnet_flax.config import flatten
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import say
from resnet_flax.training.divergence import DivergedError
from resnet_flax.training.outputs import claimed
from resnet_flax.training.session import Interrupted


def sweep(
    config: ml_collections.ConfigDict,
    seeds: Sequence[int],
    workdir: Path,
    stop: SignalHandler | None = None,
) -> dict[str, Any]:
    """Trains with every seed, in `workdir/seed<N>`; finished runs are not trained again.

    A seed with which training diverges has no error rate: the others are trained all the same.

    Args:
      config: the experiment, checked; its own seed is not used.
      seeds: each gives one run; all of them are reported.
      workdir: gets one directory per seed.
      stop: see `apply.experiment.train`.

    Returns:
      The error rates (%) after the last step of the n seeds that finished, their mean and standard
      deviation (n - 1), which is None for n < 2, as the mean is for n = 0; the seeds that diverged,
      with the reason; and their provenance.
    """
    errors, losses, diverged = dict[str, float](), dict[str, float](), dict[str, str]()
    with claimed(workdir):
        for seed in seeds:
            one = config.copy_and_resolve_references()
            with one.unlocked():
                one.seed = seed
            result = None
            try:
                result = run_experiment(one, workdir / f"seed{seed}", stop)
            except DivergedError as error:
                diverged[str(seed)] = str(error)
                say(f"warning: seed {seed}: {error}")
            if stop is not None and stop.signal:  # it came after that run's last step
                raise Interrupted(f"stopped by {stop.signal.name} after seed {seed}", stop.signal)
            if result is not None:
                errors[str(seed)] = round(100 * result.error, 4)
                losses[str(seed)] = round(result.loss, 6)
    values = list(errors.values())
    # Neither the seed, which differs, nor the data's directory on this machine.
    apart = ("seed", "data.data_dir")
    fixed = {key: value for key, value in flatten(config).items() if key not in apart}
    return {
        "split": config.data.eval_split,
        "error_percent": errors,
        "loss": losses,
        "diverged": diverged,
        "n": len(values),
        "mean": round(statistics.mean(values), 4) if values else None,
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "max": max(values, default=None),
        **provenance(),
        "config": fixed,
    }

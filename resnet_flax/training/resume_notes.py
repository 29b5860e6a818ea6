"""What a run that continues with another config than before does otherwise, in sentences.

Of the keys that may differ, most change no number; each of the others is here.
`tests/training/test_resume_safe.py` has all of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from resnet_flax.config import flatten
from resnet_flax.training.optimizer import make_schedule
from resnet_flax.training.run import Run

# Keys that change in which order a program adds numbers, and nothing else.
ROUNDING = (
    *("steps_per_dispatch", "data.resident", "data.eval_batch_size", "model.remat"),
    *("mesh.data", "mesh.fsdp"),
)
# Steps at which two schedules are compared.
_COMPARED = 1000


def notes(run: Run, meta: Mapping[str, Any]) -> list[str]:
    """The sentences on a run that continues from a checkpoint.

    Args:
      run: with the current config.
      meta: of the checkpoint.
    """
    defaults = {key: entry.default for key, entry in run.keys.items()}
    before, now = {**defaults, **flatten(meta["config"])}, flatten(run.config)
    devices = run.about["devices"]
    return [
        *_planned_otherwise(run.config, before["steps"]),
        *_averaged_already(run.config, meta),
        *_evaluated_otherwise(before, now),
        *_rounded_otherwise(before, now, meta.get("devices", devices), devices),
        *_normalized_otherwise(run.config, meta.get("devices", devices), devices),
    ]


def _planned_otherwise(config: ml_collections.ConfigDict, planned: int) -> list[str]:
    """Whether the learning rate, which may depend on the last step, is another one."""
    if planned == config.steps or min(planned, config.steps) <= config.optim.warmup_steps:
        return []
    steps = np.unique(np.linspace(0, min(planned, config.steps) - 1, _COMPARED).astype(np.int32))
    with jax.transfer_guard("allow"):
        then, now = (
            np.asarray(jax.vmap(make_schedule(config.optim, last))(steps))
            for last in (planned, config.steps)
        )
    if np.array_equal(then, now):
        return []
    return [
        f"note: the run was planned for {planned} steps; optim.schedule={config.optim.schedule} "
        f"depends on their number, so its result is not that of a run of {config.steps} steps from "
        "the start"
    ]


def _averaged_already(config: ml_collections.ConfigDict, meta: Mapping[str, Any]) -> list[str]:
    """Whether running statistics continue from recomputed ones."""
    finished = bool(config.eval.recompute_bn) and meta.get("averaged", False)
    if not finished or meta["step"] >= config.steps:
        return []
    return [
        f"note: eval.recompute_bn has replaced the running statistics at step {meta['step']}; "
        "evaluations before the last step use what continues from these, and may differ a little "
        "from those of a run without that end"
    ]


def _evaluated_otherwise(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    then, split = before["data.eval_split"], now["data.eval_split"]
    if then == split:
        return []
    return [f"note: evaluations are on the split {split!r} from here on; they were on {then!r}"]


def _rounded_otherwise(
    before: Mapping[str, Any], now: Mapping[str, Any], had: int, has: int
) -> list[str]:
    changed = [
        f"{key} is {now[key]!r} but was {before[key]!r}"
        for key in ROUNDING
        if before[key] != now[key]
    ]
    if had != has:
        changed.append(f"there are {has} devices but were {had}")
    if not changed:
        return []
    return [
        f"note: {', '.join(changed)}; numbers are added in another order, so that from here on "
        "results may differ by rounding from those of a run without the change"
    ]


def _normalized_otherwise(config: ml_collections.ConfigDict, had: int, has: int) -> list[str]:
    """Whether each device normalizes another part of a batch."""
    if config.model.bn_group_size != "device" or had == has:
        return []
    return [
        f"note: the run had {had} device{'s' * (had != 1)} and has {has} now; with "
        "model.bn_group_size=device batch normalization averages over other numbers of examples "
        "from here on"
    ]

"""Where a run starts: its newest checkpoint, if that is of the same experiment and data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from resnet_flax.config import conflicts, flatten
from resnet_flax.data import fingerprint
from resnet_flax.errors import UserError
from resnet_flax.keys import Key
from resnet_flax.runtime import distributed, storage
from resnet_flax.training import resume_notes
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.divergence import NONE, Recovery
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState

# In a workdir: the names and sizes of a folder's images.
LISTINGS = "data_files.json.gz"


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
      state: to continue from.
      step: of the state.
      averaged: whether `eval.recompute_bn` is done or off.
      changes: in the data since then, which the user accepts.
      notes: to print.
      unlogged: of the `MetricsLogger` at that step.
      recovery: of the run at that step.
    """

    state: TrainState
    step: int
    averaged: bool
    changes: list[str]
    notes: list[str]
    unlogged: dict[str, float]
    recovery: Recovery


def restore_or_init(
    run: Run, checkpoints: Checkpoints, workdir: Path, multiple_of: int = 0
) -> Start:
    """Restores the newest undamaged checkpoint, or initialises the state.

    Args:
      run: to continue.
      checkpoints: of the run.
      workdir: of the run.
      multiple_of: not 0 to prefer checkpoints whose step is a multiple.

    Raises:
      UserError: the workdir has a run of another config or, unless `data.accept_changes`, of other
        data.
    """
    config, changes = run.config, list[str]()

    def accept(meta: dict[str, Any]) -> None:
        changes[:] = _changes(run, meta, workdir)
        check_config(run.config, run.keys, meta, workdir)
        _check_data(run, meta, workdir, changes)

    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(run.programs.init, config.seed),
        run.programs.shardings,
    )
    restored = checkpoints.restore_newest(target, accept, multiple_of)
    if distributed.is_primary():
        storage.write_json(workdir / "config.json", flatten(config))
        if any(run.files.values()):
            fingerprint.write_listings(workdir / LISTINGS, run.files)
    if restored is None:
        state, notes = run.initial_state()
        return Start(state, 0, not config.eval.recompute_bn, [], notes, {}, NONE)
    state, meta, notes = restored
    step = meta["step"]
    word = "is finished" if step == config.steps else "continues"
    notes = [*notes, f"{workdir} {word} at step {step} of {config.steps}"]
    notes += resume_notes.notes(run, meta)
    if changes:
        notes.append(f"warning: the data changed, as accepted: {'; '.join(changes)}")
    averaged = not config.eval.recompute_bn
    if step == config.steps:
        averaged = averaged or meta.get("averaged", True)
    unlogged = meta.get("unlogged", {})
    return Start(state, step, averaged, changes, notes, unlogged, Recovery.of(meta))


def check_config(
    config: ml_collections.ConfigDict, keys: Mapping[str, Key], meta: dict[str, Any], workdir: Path
) -> None:
    """Raises UserError unless a run may continue from a checkpoint with this config.

    Args:
      config: of the run, checked.
      keys: all config keys.
      meta: of the checkpoint.
      workdir: of both, for the error.
    """
    # The fingerprint identifies the data; its directory may differ.
    besides = ("data.source",) if "data" in meta else ()
    different = conflicts(config, meta["config"], keys, besides)
    if different:
        listed = ", ".join(f"{k} is {b!r} but was {a!r}" for k, (a, b) in different.items())
        saved = flatten(meta["config"])
        new = [f"--config.{k}={a}" for k, (a, _) in different.items() if k not in saved]
        former = f" (pass {' '.join(new)} for what was usual before there was such a key)"
        raise UserError(
            f"{workdir} has a run of another config: {listed}; give another --workdir, or the "
            f"config that the run started with{former * bool(new)}"
        )
    if meta["step"] > config.steps:
        raise UserError(
            f"{workdir} has a run of {meta['step']} steps, more than steps={config.steps}; "
            "give another --workdir, or at least as many steps"
        )


def _changes(run: Run, meta: dict[str, Any], workdir: Path) -> list[str]:
    """The differences between the data of a checkpoint and the current data."""
    now = run.about["data"]
    # Older checkpoints have no fingerprints, only the names of the classes.
    names = {"kind": now["train"]["kind"], "class_names": meta["class_names"]}
    saved = meta.get("data") or {"train": {**now["train"], **names}}
    listed = fingerprint.read_listings(workdir / LISTINGS)
    same_split = flatten(meta["config"]).get("data.eval_split") == run.config.data.eval_split
    found: dict[str, None] = {}  # in order, each once, as both splits may have one source
    for split, described in (("train", "training"), ("eval", "evaluation")):
        if split in saved and (split == "train" or same_split):
            before = listed.get(split, {})
            for one in fingerprint.differences(saved[split], now[split], before, run.files[split]):
                found[f"of the {described} images, {one}"] = None
    return list(found)


def _check_data(run: Run, meta: dict[str, Any], workdir: Path, changes: list[str]) -> None:
    if not changes:
        return
    listed = "; ".join(changes)
    was, classes = len(meta["class_names"]), len(run.about["class_names"])
    if was != classes:
        raise UserError(
            f"{workdir} was trained on other data: {listed}; its network has {was} classes "
            f"and the data has {classes} now: restore the data that the run started with, or "
            "give another --workdir"
        )
    if not run.config.data.accept_changes:
        raise UserError(
            f"{workdir} was trained on other data: {listed}; restore the data that the run "
            "started with, give another --workdir, or continue with the current data by "
            "--config.data.accept_changes=true"
        )

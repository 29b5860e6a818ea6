"""What a target needs: training runs, their cost, and missing data."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from resnet_flax import renamed
from resnet_flax.apply import tables
from resnet_flax.config import config_name, conflicts, load_config
from resnet_flax.data.experiment import open_splits
from resnet_flax.errors import UserError
from resnet_flax.models import configured_model
from resnet_flax.models.summary import native_size, summarize
from resnet_flax.paper.targets import Target
from resnet_flax.runtime.storage import exists, read_json
from resnet_flax.training.checkpoint_files import steps_in

# Floating-point operations per second that a device sustains in training. Only the CPU's was
# measured: 250 images of 32 x 32 per second through ResNet-20 on two cores.
SUSTAINED = {"cpu": 61e9, "gpu": 30e12, "tpu": 30e12}
MEASURED = ("cpu",)

# Prefixes of settings that affect how or where a run is computed, but not its result.
CHANGES_NOTHING = (
    *("data.data_dir=", "data.workers=", "data.timeout=", "data.accept_changes="),
    *("mesh.", "log.", "checkpoint."),
)


class Training(NamedTuple):
    """One network to train with one seed.

    Attributes:
      row: name of its row.
      config: checked.
      workdir: of the run.
    """

    row: str
    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the finished run; None if there is none with this config."""
        found = read_json(self.workdir / "result.json")
        wanted = {"step": self.config.steps, "split": self.config.data.eval_split}
        if not found or any(found.get(key) != value for key, value in wanted.items()):
            return None
        return None if conflicts(self.config, found.get("config", {}), tables.keys()) else found

    @property
    def steps_left(self) -> int:
        """Steps after the newest checkpoint."""
        return self.config.steps - max(steps_in(self.workdir / "checkpoints"), default=0)


def trainings(
    target: Target, seeds: Sequence[int], root: Path, settings: Sequence[str] = ()
) -> list[Training]:
    """All training runs of a target, one seed of every network before the next seed.

    Args:
      target: the table or figure.
      seeds: of each network; an ensemble defines its own.
      root: each run has a directory in it.
      settings: config keys that differ from the paper's, 'key=value'; runs with such changes have
        separate directories, so that no real run continues from a rehearsal.
    """
    apart = changes(settings)
    former = renamed.former_settings(apart)
    found: dict[Path, Training] = {}
    for seed in seeds:
        for row in target.rows:
            wanted = [(row.config, seed)] if row.config else []
            for path, member in [*wanted, *(row.members if seed == seeds[0] else ())]:
                config = load_config(path)
                tables.override(config, [*row.settings, *settings, f"seed={member}"])
                name = "-".join([config_name(path), *_values(row.settings)])
                workdir = root / (name + _suffix(apart)) / f"seed{member}"
                before = root / (name + _suffix(former)) / f"seed{member}"
                workdir = before if exists(before) else workdir
                found.setdefault(workdir, Training(row.name, tables.check(config), workdir))
    return list(found.values())


def changes(settings: Sequence[str]) -> list[str]:
    """The settings 'key=value' that can change a result, under their current names."""
    settings = renamed.saved_settings(settings)
    return [setting for setting in settings if not setting.startswith(CHANGES_NOTHING)]


def _suffix(apart: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(apart).encode()).hexdigest()
    return f"-{digest[:8]}" if apart else ""


def _values(settings: Sequence[str]) -> list[str]:
    return [setting.partition("=")[2] for setting in settings]


def cost(planned: Sequence[Training]) -> float:
    """Floating-point operations of the remaining training: three passes, two per multiply-add."""
    total = 0.0
    for one in planned:
        if one.result is None:
            model = configured_model(one.config.model, num_classes=10)
            side = one.config.data.size or native_size(model)
            adds = summarize(model, (side, side, 3)).multiply_adds
            total += 6.0 * adds * one.config.batch_size * one.steps_left
    return total


def lacking(planned: Sequence[Training]) -> list[UserError]:
    """Missing data, as one error each."""
    errors: dict[Any, UserError | None] = {}
    for one in planned:
        if one.result is not None:
            continue
        data = one.config.data
        key = (data.source, data.data_dir, data.train_split, data.eval_split)
        if key not in errors:
            errors[key] = None
            try:
                open_splits(one.config.data)
            except UserError as error:
                errors[key] = error
    return list({str(error): error for error in errors.values() if error}.values())


def sustained() -> tuple[float, bool]:
    """Operations per second of all devices, and whether that was measured."""
    platform = jax.devices()[0].platform
    count = 1 if platform == "cpu" else jax.device_count()
    return count * SUSTAINED.get(platform, SUSTAINED["gpu"]), platform in MEASURED

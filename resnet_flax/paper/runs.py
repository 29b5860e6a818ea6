"""Trains and evaluates what a target needs, and gathers what was found."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from resnet_flax.config import (
    config_name,
    conflicts,
    load_config,
    override,
    resolve,
)
from resnet_flax.data.experiment import open_splits
from resnet_flax.data.sources import open_source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.labels import as_outputs
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.evaluation.protocols import Network
from resnet_flax.models import configured_model
from resnet_flax.models.summary import native_size, summarize
from resnet_flax.paper.responses import responses
from resnet_flax.paper.targets import Row, Target
from resnet_flax.provenance import provenance, read_json, write_json
from resnet_flax.train.interrupt import Interruption
from resnet_flax.train.loop import Stopped
from resnet_flax.train.loop import train as train_network
from resnet_flax.train.writers import read_metrics
from resnet_flax.weights.loading import open_pretrained

# Floating-point operations a second that a device sustains in training. Measured is the CPU's:
# 250 images of 32 x 32 a second through ResNet-20 on two cores.
SUSTAINED = {"cpu": 61e9, "gpu": 30e12, "tpu": 30e12}
MEASURED = ("cpu",)


class Training(NamedTuple):
    """One network to train with one seed.

    Attributes:
      row: its row's name.
      config: resolved.
      workdir: of the run.
    """

    row: str
    config: ml_collections.ConfigDict
    workdir: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run left; None where there is none of this config."""
        found = read_json(self.workdir / "result.json")
        if not found or found["step"] != self.config.steps:
            return None
        return None if conflicts(self.config, found["config"]) else found

    @property
    def steps_left(self) -> int:
        """Steps that are not in a checkpoint."""
        done = [int(path.name) for path in self.workdir.glob("checkpoints/[0-9]*")]
        return self.config.steps - max(done, default=0)


def trainings(
    target: Target, seeds: Sequence[int], root: Path, settings: Sequence[str] = ()
) -> list[Training]:
    """All that a target needs, one seed of every network before the next seed.

    Args:
      target: the table or figure.
      seeds: of each network; an ensemble has its own.
      root: each run has a directory in it.
      settings: config keys that differ from the paper's, 'key=value'.
    """
    found: dict[Path, Training] = {}
    for seed in seeds:
        for row in target.rows:
            wanted = [(row.config, seed)] if row.config else []
            for path, member in [*wanted, *(row.members if seed == seeds[0] else ())]:
                config = load_config(path)
                override(config, [*row.settings, *settings, f"seed={member}"])
                name = "-".join([config_name(path), *_values(row.settings)])
                workdir = root / name / f"seed{member}"
                found.setdefault(workdir, Training(row.name, resolve(config), workdir))
    return list(found.values())


def _values(settings: Sequence[str]) -> list[str]:
    return [setting.partition("=")[2] for setting in settings]


def cost(planned: Sequence[Training]) -> float:
    """Floating-point operations that training still takes, three passes of two each a multiply."""
    total = 0.0
    for one in planned:
        if one.result is None:
            model = configured_model(one.config.model, num_classes=10)
            side = one.config.data.size or native_size(model)
            adds = summarize(model, (side, side, 3)).multiply_adds
            total += 6.0 * adds * one.config.batch_size * one.steps_left
    return total


def lacking(planned: Sequence[Training]) -> list[str]:
    """What is not there to train with, a sentence each."""
    sentences = {}
    for one in planned:
        data = one.config.data
        key = (data.source, data.data_dir, data.train_split, data.eval_split)
        if key not in sentences:
            try:
                open_splits(one.config.data)
                sentences[key] = ""
            except UserError as error:
                sentences[key] = str(error)
    return [sentence for sentence in dict.fromkeys(sentences.values()) if sentence]


def run(
    target: Target,
    planned: Sequence[Training],
    out: Path,
    stop: Interruption,
    *,
    changed: Sequence[str] = (),
    data_dir: str = "",
    batch_size: int = 100,
    say: Callable[[str], None] = print,
) -> None:
    """Trains and evaluates what is missing, and writes what is there after each.

    Args:
      target: the table or figure.
      planned: see `trainings`.
      out: JSON that gets the results; what it holds of other runs stays.
      stop: ends it with everything saved.
      data_dir: of TFDS, for published weights.
      changed: settings that are not the paper's, which are written beside the results.
      batch_size: of evaluation.
      say: what to do with what is to be read.

    Raises:
      Stopped: a signal came.
    """
    of_row = {row.name: row for row in target.rows}
    for number, one in enumerate(planned, start=1):
        seed = one.config.seed
        say(f"[{number} of {len(planned)}] {one.row}, seed {seed}")
        if one.result is None:
            train_network(one.config, one.workdir, stop)
        if stop.signal:
            raise Stopped(f"stopped by {stop.signal.name} behind {one.workdir}", stop.signal)
        if of_row[one.row].members:
            continue  # evaluated together
        found = _record(target, of_row[one.row], [one], batch_size)
        _merge(out, {**found, "row": one.row, "seed": seed, "changed": list(changed)})
    for row in target.rows:
        if row.weights:
            say(row.weights)
            _merge(out, {**_published(target, row, data_dir, batch_size), "changed": []})
        if row.members:
            members = [one for one in planned if one.row == row.name]
            members += [one for one in planned if one.row != row.name and _is_member(one, row)]
            found = _record(target, row, members, batch_size)
            _merge(out, {**found, "row": row.name, "seed": 0, "changed": list(changed)})


def _is_member(one: Training, row: Row) -> bool:
    return any(
        one.workdir.parent.name == config_name(path) and one.config.seed == seed
        for path, seed in row.members
    )


def _record(
    target: Target, row: Row, members: Sequence[Training], batch_size: int
) -> dict[str, Any]:
    """Error rates (%) and what they come from; evaluated where the training did not do that."""
    one = members[0]
    result = one.result
    assert result is not None
    errors = {"top-1": result["errors"] / result["count"], "top-5": result["top5_error"]}
    if target.protocol != "center" or row.members:
        errors = _evaluated(target.protocol, members, batch_size)
    record = {
        "protocol": target.protocol,
        "error": {name: round(100 * errors[name], 4) for name in target.columns},
        "curve": _curve(one),
        **{key: result[key] for key in ("commit", "device", "versions", "config")},
    }
    # Where the data lies on this machine is nobody's business.
    record["config"] = {k: v for k, v in record["config"].items() if k != "data.data_dir"}
    if target.draws == "responses":
        found = open_pretrained(str(one.workdir))
        network = Network(found.model, found.variables, _preprocessing(found))
        record["responses"] = responses(network, _test_set(one, found))
    return record


def _published(target: Target, row: Row, data_dir: str, batch_size: int) -> dict[str, Any]:
    found = open_pretrained(row.weights)
    source = open_source(row.data, "test", data_dir)
    source = as_outputs(source, found.class_names, found.model.num_classes)
    network = Network(found.model, found.variables, _preprocessing(found))
    result = evaluate_pretrained([network], source, protocol=target.protocol, batch_size=batch_size)
    errors = {"top-1": result.error, "top-5": result.top5_error}
    return {
        "row": row.name,
        "seed": 0,
        "weights": found.origin,
        "weights_sha256": found.sha256,
        "protocol": target.protocol,
        "error": {name: round(100 * errors[name], 4) for name in target.columns},
        "responses": responses(network, source),
        **provenance(),
    }


def _preprocessing(found: Any) -> Any:
    assert found.preprocessing is not None  # a checkpoint's says
    return found.preprocessing


def _test_set(one: Training, found: Any) -> Any:
    data = one.config.data
    if data.eval_split == "holdout":
        return open_splits(data)[1]
    source = open_source(data.source, data.eval_split, data.data_dir)
    return as_outputs(source, found.class_names, found.model.num_classes)


def _evaluated(protocol: str, members: Sequence[Training], batch_size: int) -> dict[str, float]:
    """Error rates under a protocol, kept in the workdir of the first member."""
    path = members[0].workdir / f"{protocol}{'_ensemble' * (len(members) > 1)}.json"
    which = [[str(one.workdir), one.config.steps, one.config.seed] for one in members]
    known = read_json(path)
    if known and known["of"] == which and known["data"] == members[0].config.data.source:
        return {name: known[name] for name in ("top-1", "top-5")}
    opened = [open_pretrained(str(one.workdir)) for one in members]
    result = evaluate_pretrained(
        [Network(found.model, found.variables, _preprocessing(found)) for found in opened],
        _test_set(members[0], opened[0]),
        protocol=protocol,
        batch_size=batch_size,
        workers=members[0].config.data.workers,
    )
    errors = {"top-1": result.error, "top-5": result.top5_error}
    about = {"of": which, "data": members[0].config.data.source, "count": result.count}
    write_json(path, {**errors, **about, **provenance()})
    return errors


def _curve(one: Training) -> dict[str, list[Any]]:
    """Test error at each evaluation and the mean training error since the one before."""
    records = read_metrics(one.workdir / "metrics.jsonl")
    test = [r for r in records if r["split"] == one.config.data.eval_split]
    train = [(r["step"], r["error"]) for r in records if r["split"] == "train"]
    curve: dict[str, list[Any]] = {"train": [], "test": []}
    before = 0
    for record in test:
        step = record["step"]
        since = [error for at, error in train if before < at <= step]
        if since:
            curve["train"].append([step, round(100 * sum(since) / len(since), 2)])
        curve["test"].append([step, round(100 * record["error"], 2)])
        before = step
    return curve


def _merge(out: Path, record: dict[str, Any]) -> None:
    kept = read_json(out) or []
    which = ("row", "seed", "protocol", "changed")
    kept = [old for old in kept if any(old.get(key) != record[key] for key in which)]
    write_json(out, [*kept, record])


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Stops a run as SIGTERM does, so that it can go on later; 0 for no limit."""
    if not minutes:
        yield
        return
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def sustained() -> tuple[float, bool]:
    """Operations a second of all devices, and whether that was measured."""
    platform = jax.devices()[0].platform
    count = 1 if platform == "cpu" else jax.device_count()
    return count * SUSTAINED.get(platform, SUSTAINED["gpu"]), platform in MEASURED

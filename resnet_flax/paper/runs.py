"""Trains and evaluates what a target needs, and collects the results."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_flax import renamed
from resnet_flax.apply.experiment import run_experiment
from resnet_flax.data.experiment import open_splits
from resnet_flax.data.sources import open_source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.labels import as_outputs
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.paper.planning import Training
from resnet_flax.paper.responses import responses
from resnet_flax.paper.targets import Row, Target
from resnet_flax.runtime import terminal
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.storage import exists, read_json, write_json
from resnet_flax.training.divergence import DivergedError
from resnet_flax.training.session import Interrupted
from resnet_flax.training.writers import read_metrics
from resnet_flax.weights.loading import load


def run(
    target: Target,
    planned: Sequence[Training],
    out: Path,
    stop: SignalHandler,
    *,
    changed: Sequence[str] = (),
    data_dir: str = "",
    batch_size: int = 100,
    say: Callable[[str], None] = terminal.say,
) -> list[str]:
    """Trains and evaluates what is missing, and writes the results so far after each run.

    A run that diverges has no result, nor has an ensemble with it; the others are trained.

    Args:
      target: the table or figure.
      planned: see `trainings`.
      out: JSON file for the results; results of other runs in it are kept.
      stop: its signal stops the run with everything saved.
      changed: settings that differ from the paper's, which are written next to the results.
      data_dir: of TFDS, for published weights.
      batch_size: of evaluation.
      say: prints a message.

    Returns:
      The rows and seeds of the runs that diverged, in words.

    Raises:
      Interrupted: a signal came.
    """
    diverged: dict[Path, str] = {}
    results(out)  # fails early if it is not a results file
    of_row = {row.name: row for row in target.rows}
    for number, one in enumerate(planned, start=1):
        seed = one.config.seed
        say(f"[{number} of {len(planned)}] {one.row}, seed {seed}")
        try:
            if one.result is None:
                run_experiment(one.config, one.workdir, stop)
        except DivergedError as error:
            diverged[one.workdir] = f"{one.row}, seed {seed}"
            say(f"warning: {diverged[one.workdir]}: {error}")
        if stop.signal:
            raise Interrupted(f"stopped by {stop.signal.name} after {one.workdir}", stop.signal)
        if of_row[one.row].members or one.workdir in diverged:
            continue  # members are evaluated together
        found = _record(target, of_row[one.row], [one], batch_size, stop)
        _merge(out, {**found, "row": one.row, "seed": seed, "changed": list(changed)})
    for row in target.rows:
        if row.weights:
            say(row.weights)
            _merge(out, {**_published(target, row, data_dir, batch_size, stop), "changed": []})
        if row.members:
            members = [one for one in planned if one.row == row.name]
            if any(one.workdir in diverged for one in members):
                continue
            found = _record(target, row, members, batch_size, stop)
            _merge(out, {**found, "row": row.name, "seed": 0, "changed": list(changed)})
    return list(diverged.values())


def _or_stop(stop: SignalHandler) -> Callable[[int, int], None]:
    """A function that an evaluation calls after each batch."""

    def check(done: int, total: int) -> None:
        if stop.signal:
            raise Interrupted(
                f"stopped by {stop.signal.name} after {done:,} of {total:,} images of an "
                "evaluation; run the same command again to repeat it",
                stop.signal,
            )

    return check


def _record(
    target: Target, row: Row, members: Sequence[Training], batch_size: int, stop: SignalHandler
) -> dict[str, Any]:
    """Error rates (%) and their provenance; evaluated if training has not done so."""
    one = members[0]
    result = one.result
    assert result is not None
    errors: dict[str, Any] = {
        "top-1": result["errors"] / result["count"],
        "top-5": result["top5_error"],
    }
    record: dict[str, Any] = {"experiment": row.config or row.name, "protocol": target.protocol}
    if target.protocol != "center" or row.members:
        errors = _evaluated(target.protocol, members, batch_size, stop)
        record["evaluated"] = {key: errors[key] for key in ("commit", "device", "versions")}
    record["error"] = {name: round(100 * errors[name], 4) for name in target.columns}
    if row.members:
        members_of = [
            {"config": other.config.model.name, "seed": other.config.seed, **_origin(other)}
            for other in members
        ]
        return {**record, "members": members_of, **record["evaluated"]}
    record |= {"curve": _curve(one), **_origin(one), "versions": result["versions"]}
    # The data's directory on this machine does not matter to readers.
    record["config"] = {k: v for k, v in result["config"].items() if k != "data.data_dir"}
    if target.draws == "responses":
        found = load(one.workdir)
        network = Network(found.model, found.variables, _preprocessing(found))
        record["responses"] = responses(network, _test_set(one, found))
    return record


def _origin(one: Training) -> dict[str, Any]:
    assert one.result is not None
    known = ("commit", "device", "sessions")
    found: dict[str, Any] = {key: one.result[key] for key in known if key in one.result}
    if "sittings" in one.result:  # the old name of sessions, before 2026-11-28
        found["sessions"] = one.result["sittings"]
    return found


def _published(
    target: Target, row: Row, data_dir: str, batch_size: int, stop: SignalHandler
) -> dict[str, Any]:
    found = load(row.weights)
    source = open_source(row.data, "test", data_dir)
    source = as_outputs(source, found.class_names, found.model.num_classes, say=terminal.say)
    network = Network(found.model, found.variables, _preprocessing(found))
    result = evaluate_pretrained(
        *([network], source),
        protocol=target.protocol,
        batch_size=batch_size,
        progress=_or_stop(stop),
    )
    errors = {"top-1": result.error, "top-5": result.top5_error}
    return {
        "experiment": row.weights,
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
    assert found.preprocessing is not None  # every checkpoint has it
    return found.preprocessing


def _test_set(one: Training, found: Any) -> Any:
    data = one.config.data
    if data.eval_split == "holdout":
        source = open_splits(data)[1]
    else:
        source = open_source(data.source, data.eval_split, data.data_dir)
    return as_outputs(source, found.class_names, found.model.num_classes, say=terminal.say)


def _evaluated(
    protocol: str, members: Sequence[Training], batch_size: int, stop: SignalHandler
) -> dict[str, Any]:
    """Error rates under a protocol, kept in the workdir of the first member."""
    path = members[0].workdir / f"{protocol}{'_ensemble' * (len(members) > 1)}.json"
    # All figures that each member's training ended with, which differ if it is trained again.
    which = [one.result for one in members]
    known = read_json(path)
    if known and known.get("of") == which:
        return known
    opened = [load(one.workdir) for one in members]
    result = evaluate_pretrained(
        [Network(found.model, found.variables, _preprocessing(found)) for found in opened],
        _test_set(members[0], opened[0]),
        protocol=protocol,
        batch_size=batch_size,
        workers=members[0].config.data.workers,
        progress=_or_stop(stop),
    )
    errors = {"top-1": result.error, "top-5": result.top5_error}
    found = {**errors, "of": which, "count": result.count, **provenance()}
    write_json(path, found)
    return found


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


def results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; empty if there is no file.

    Raises:
      UserError: it is not a results file, and must not be overwritten.
    """
    if not exists(path):
        return []
    found = read_json(path, list)
    keys = {
        "experiment",
        "row",
        "seed",
        "protocol",
        "changed",
        "error",
        "commit",
        "device",
        "versions",
    }
    if not isinstance(found, list) or not all(
        isinstance(record, dict) and keys <= set(record) for record in found
    ):
        raise UserError(f"{path} is not a results file of reproduce; give another file as --out")
    return [{**one, "changed": renamed.saved_settings(one["changed"])} for one in found]


def _merge(out: Path, record: dict[str, Any]) -> None:
    kept = results(out)
    which = ("experiment", "row", "seed", "protocol", "changed")
    kept = [old for old in kept if any(old.get(key) != record[key] for key in which)]
    write_json(out, [*kept, record])


@contextlib.contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Stops a run as SIGTERM does, so that it can continue later; 0 for no limit."""
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

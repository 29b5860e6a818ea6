"""What a run writes into its workdir beside checkpoints and metrics."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from resnet_flax import distributed
from resnet_flax.config import flatten
from resnet_flax.errors import UserError
from resnet_flax.evaluation.metrics import Result
from resnet_flax.provenance import provenance
from resnet_flax.runtime.lock import Lock
from resnet_flax.runtime.storage import make_directory, read_json, write_json
from resnet_flax.runtime.terminal import say
from resnet_flax.train.curves import draw_curves


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """A context in which the workdir is this run's alone and can be written.

    The first process asks for all.

    Raises:
      UserError: another run is in it, or it cannot be written, which is found out now and not
        after hours.
    """
    with contextlib.ExitStack() as stack:
        failed: UserError | None = None
        if distributed.is_first():
            try:
                _check_writable(workdir)
                stack.enter_context(Lock(workdir))
            except UserError as error:
                failed = error
        if distributed.largest(int(failed is not None)):
            raise failed or UserError(f"process 0 cannot use the workdir {workdir}; it says why")
        yield


def _check_writable(workdir: Path) -> None:
    try:
        for directory in (workdir, workdir / "checkpoints"):
            make_directory(directory)
            probe = directory / ".writable"
            probe.write_text("yes")
            probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror} ({error.filename}); give "
            "one that can be written as --workdir"
        ) from error


def note_session(workdir: Path, start: int, steps: int, changes: Sequence[str]) -> None:
    """Notes with what this part of the run is trained, before anything of that can change.

    Args:
      workdir: of the run.
      start: the step that it goes on from.
      steps: of the whole run.
      changes: in the data, accepted by `data.accept_changes`.
    """
    path = workdir / "sittings.json"
    if start < steps or changes:
        before = read_json(path) if start else None
        noted = {"data_changes": list(changes)} if changes else {}
        write_json(path, [*(before or []), {"from_step": start, **provenance(), **noted}])


def report(
    config: ml_collections.ConfigDict, title: str, workdir: Path, result: Result, *, new: bool
) -> None:
    """Writes result.json and curves.png and says where things are.

    Args:
      config: of the run.
      title: of the curves.
      workdir: of the run.
      result: of the evaluation after the last step.
      new: the run was trained, or evaluated on other data, since result.json was written.
    """
    finished = {
        "split": config.data.eval_split,
        "step": config.steps,
        "errors": result.errors,
        "count": result.count,
        "top5_error": result.top5_error,
        "loss": result.loss,
    }
    path = workdir / "result.json"
    known = read_json(path) or {}
    # What a finished run left says with which commit and device it was trained: that stays, though
    # an evaluation elsewhere may differ by a rounding.
    if new or any(known.get(key) != finished[key] for key in ("split", "step", "count")):
        sessions = read_json(workdir / "sittings.json") or [provenance()]
        last = {k: v for k, v in sessions[-1].items() if k not in ("from_step", "data_changes")}
        earlier = {"sittings": sessions} if len(sessions) > 1 else {}
        saved: dict[str, Any] = {**finished, **last, **earlier, "config": flatten(config)}
        write_json(path, saved)
    curves = workdir / "curves.png"
    draw_curves(workdir / "metrics.jsonl", curves, title)
    error = f"{config.data.eval_split} error: {100 * result.error:.2f} %"
    say(f"curves: {curves}")
    say(f"checkpoints: {workdir / 'checkpoints'}")
    say(f"{error} ({result.errors} of {result.count}, loss {result.loss:.4f})")

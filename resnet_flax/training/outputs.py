"""What a run writes into its workdir besides checkpoints and metrics."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_flax.data.fingerprint import without_digests
from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import is_file, probe_directory, read_json, write_json
from resnet_flax.runtime.storage.lock import Lock
from resnet_flax.runtime.terminal import say
from resnet_flax.training.curves import draw_curves
from resnet_flax.training.digests import sha256_of

# In a workdir: what each session of the run was trained with; and its name before 2026-11-28.
SESSIONS, OLD_SESSIONS = "sessions.json", "sittings.json"


@contextlib.contextmanager
def claimed(workdir: Path, *inside: str) -> Iterator[None]:
    """A context in which the workdir is writable, and used by this run only.

    The first process checks for all.

    Args:
      workdir: created if missing.
      inside: subdirectories, created too.

    Raises:
      UserError: another run uses it, or it cannot be written; this is checked now, not after hours.
    """
    with contextlib.ExitStack() as stack:
        failed: UserError | None = None
        if distributed.is_primary():
            try:
                stack.enter_context(Lock(workdir))
                for directory in (workdir, *(workdir / name for name in inside)):
                    probe_directory(directory)
            except UserError as error:
                failed = error
            except OSError as error:
                reason = (
                    f"{error.strerror} ({error.filename})" if error.filename else error.strerror
                )
                if isinstance(error, FileExistsError | NotADirectoryError):
                    there = [p for p in (workdir, *workdir.parents) if is_file(p)]
                    which = "it" if there[:1] == [workdir] else there[0] if there else ""
                    reason = f"{which} is a file, not a directory" if which else reason
                failed = UserError(
                    f"cannot write to the workdir {workdir}: {reason}; "
                    "give one that can be written as --workdir"
                )
        if distributed.all_max(int(failed is not None)):
            raise failed or UserError(f"process 0 cannot use the workdir {workdir}; see its error")
        distributed.assert_shared(workdir)
        yield


def note_session(
    workdir: Path,
    start: int,
    steps: int,
    changes: Sequence[str],
    recovered: Mapping[str, Any],
) -> None:
    """Records what this session is trained with, before any of that can change.

    Args:
      workdir: of the run.
      start: the step that it continues from.
      steps: of the complete run.
      changes: in the data, accepted by `data.accept_changes`.
      recovered: how it goes on after it diverged, see `divergence.Recoveries.begin`.
    """
    if start < steps or changes:
        before = _sessions(workdir) if start or recovered else []
        noted: dict[str, Any] = {"data_changes": list(changes)} if changes else {}
        noted |= {"recovered": dict(recovered)} if recovered else {}
        write_json(workdir / SESSIONS, [*before, {"from_step": start, **provenance(), **noted}])


def _sessions(workdir: Path) -> list[dict[str, Any]]:
    return read_json(workdir / SESSIONS, list) or read_json(workdir / OLD_SESSIONS, list) or []


def report(about: dict[str, Any], title: str, workdir: Path, result: Any, *, new: bool) -> None:
    """Writes result.json and curves.png, and prints where the results are.

    Args:
      about: the metadata of the run's checkpoints.
      title: of the curves.
      workdir: of the run.
      result: of the evaluation after the last step: `final()` is its JSON, with the `count` of
        examples, and `str()` a sentence.
      new: whether the run was trained since result.json was written.
    """
    config = about["config"]
    split = config["data.eval_split"]
    finished = {
        "split": split,
        "step": config["steps"],
        **result.final(),
        "data": {name: sha256_of(data)[:16] for name, data in about["data"].items()},
    }
    path = workdir / "result.json"
    known = read_json(path) or {}
    # The result of a finished run records the commit and device that trained it, and is kept,
    # though an evaluation elsewhere may differ by rounding. On other data it is a new result.
    same = all(known.get(key) == finished[key] for key in ("split", "step", "count"))
    before = {name: sha256_of(without_digests(d))[:16] for name, d in about["data"].items()}
    if new or not same or known.get("data", before) not in (before, finished["data"]):
        sessions = _sessions(workdir) or [provenance()]
        of_a_session = ("from_step", "data_changes", "recovered")
        last = {k: v for k, v in sessions[-1].items() if k not in of_a_session}
        earlier = {"sessions": sessions} if len(sessions) > 1 else {}
        write_json(path, {**finished, **last, **earlier, "config": config})
    curves = workdir / "curves.png"
    try:
        draw_curves(workdir / "metrics.jsonl", curves, title)
    except OSError as error:
        raise UserError(
            f"{curves} cannot be written: {error.strerror}; everything else is in {workdir}"
        ) from error
    say(f"curves: {curves}")
    say(f"checkpoints: {workdir / 'checkpoints'}")
    say(f"{split} {result}")

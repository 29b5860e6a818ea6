"""The files of a checkpoint, and reading them with every byte verified.

The directory has Orbax's `state` (the train state), `meta` (JSON: format version, config, class
names, preprocessing, a fingerprint of the data, a digest of every leaf) and `sha256.json` (a digest
of every file). Orbax and its stores hardly detect damage themselves: of 100 single flipped bits
they restored 94 without an error, 90 of them to wrong numbers.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from resnet_flax import renamed
from resnet_flax.errors import UserError
from resnet_flax.training.digests import digests, sha256_of, sha256_of_file
from resnet_flax.training.quiet import silence_stores

FORMAT = 1
SUMS = "sha256.json"
# Orbax writes these last; nothing here reads them.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt", SUMS)


class DamagedError(Exception):
    """A checkpoint's bytes are not those that were saved; the message names what differs."""


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      DamagedError: its bytes are not those that were saved.
      UserError: it was written by a later version of this package.
    """
    try:
        meta = json.loads((path / "meta" / "metadata").read_bytes())
        claimed = meta.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"its metadata cannot be read ({reason(error)})") from error
    if sha256_of(meta) != claimed:
        raise DamagedError("its metadata does not match its digest")
    if meta["format"] > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {meta['format']}, but this version of resnet_flax reads "
            f"up to {FORMAT}; use a newer version"
        )
    return {**meta, "config": renamed.saved_config(meta["config"])}


def read_state(path: Path, target: Any, meta: dict[str, Any]) -> Any:
    """The state of one checkpoint, every leaf and every file verified.

    Args:
      path: the checkpoint's directory.
      target: shapes, types and shardings of the state.
      meta: see `read_meta`.

    Raises:
      DamagedError: names the first file that differs or, if no file differs or there are no digests
        of files because of a crash, the first leaf.
      UserError: it is undamaged, but of another network or optimiser than the target.
    """
    # Files first, as the stores cannot handle damaged bytes and may print a lot.
    try:
        wrong = next(_wrong_files(path), None)
    except OSError as error:
        raise DamagedError(f"its files cannot be read ({reason(error)})") from error
    if wrong is not None:
        raise DamagedError(f"{wrong} does not match its digest")
    try:
        _check_shapes(path, _saved_tree(path), target)
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore((path / "state").absolute(), target)
    except (UserError, DamagedError):
        raise
    except Exception as error:  # errors of all types
        raise DamagedError(f"its state cannot be read ({reason(error)})") from error
    for leaf, digest in digests(state).items():
        if meta["digests"].get(leaf) != digest:
            raise DamagedError(f"{leaf} does not match its digest")
    return state


def newest(directory: Path) -> Path:
    """The newest checkpoint in a directory of them.

    Raises:
      UserError: there is none.
    """
    steps = steps_in(directory)
    if not steps:
        raise UserError(f"{directory} has no finished checkpoint yet")
    return directory / str(steps[0])


def read_variables(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The network's `params` and `batch_stats` of one checkpoint, on one device, verified.

    Args:
      path: the checkpoint's directory.
      meta: see `read_meta`.

    Raises:
      DamagedError: see `read_state`.
    """
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), _saved_tree(path)
    )
    state = read_state(path, target, meta)
    return {name: state[name] or {} for name in ("params", "batch_stats")}


def _saved_tree(path: Path) -> Any:
    """Shapes and types of a checkpoint's leaves, from Orbax's metadata."""
    silence_stores()
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.metadata((path / "state").absolute()).item_metadata.tree
    except Exception as error:  # errors of all types
        raise DamagedError(f"its state cannot be read ({reason(error)})") from error


def _check_shapes(path: Path, saved: Any, target: Any) -> None:
    """Raises UserError if leaves differ; such a checkpoint is not damaged."""

    def shapes(tree: Any) -> dict[str, list[int]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        simple = jax.tree_util.keystr
        return {simple(name, simple=True, separator="/"): list(x.shape) for name, x in leaves}

    there, wanted = shapes(saved), shapes(target)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {path} is of another network or optimiser: {name} is "
                f"{there.get(name, 'not there')}, and {wanted.get(name, 'not there')} in what "
                "this config; give the config and version that it was saved with, or another "
                "--workdir"
            )


def write_sums(path: Path) -> None:
    """Writes the digests of all files of a checkpoint into it, before it is renamed."""
    sums = {name: sha256_of_file(path / name) for name in _files(path)}
    (path / SUMS).write_text(json.dumps(sums))


def steps_in(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, the newest first."""
    if not directory.is_dir():
        return []
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    steps = (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
    return sorted(steps, reverse=True)


def _wrong_files(path: Path) -> Iterator[str]:
    """Files that differ from their digests; none if there are no digests.

    Up to version 0.1, digests were written after the checkpoint was renamed.
    """
    if not (path / SUMS).exists():
        return
    try:
        sums = json.loads((path / SUMS).read_bytes())
    except ValueError:
        yield SUMS
        return
    if not isinstance(sums, dict) or "meta/metadata" not in sums:
        yield SUMS
        return
    # Other files there (such as a file manager's) do no harm.
    for name, digest in sums.items():
        if not (path / name).is_file() or sha256_of_file(path / name) != digest:
            yield name


def _files(path: Path) -> list[str]:
    names = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if name not in _LATE)


def reason(error: BaseException) -> str:
    """One line of an error or of its cause, as the stores' own messages have many."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    for known in ("No space left on device", "File too large", "Read-only file system"):
        if known in text:
            return known
    return (text.splitlines() or [type(error).__name__])[0][:200]

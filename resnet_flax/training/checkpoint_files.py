"""The files of a checkpoint, and reading them with every byte verified.

The directory has Orbax's `state` (the train state), `meta` (JSON: format version, config, class
names, preprocessing, a fingerprint of the data, a digest of every leaf) and `sha256.json` (a digest
of every file). Orbax and its stores hardly detect damage themselves: of 100 single flipped bits
they restored 94 without an error, 90 of them to wrong numbers.
"""

import contextlib
import errno
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from resnet_flax import renamed
from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed, storage
from resnet_flax.training.digests import digests, sha256_of
from resnet_flax.training.quiet import silence_stores

FORMAT = 1
SUMS = "sha256.json"
# Every finished checkpoint has this file.
_META = "meta/metadata"
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
        meta = json.loads(storage.read(path / _META))
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


def read_together(
    path: Path, target: Any, accept: Callable[[dict[str, Any]], None]
) -> tuple[Any, dict[str, Any]]:
    """The state and the metadata of one checkpoint, read by all processes.

    Args:
      path: the checkpoint's directory.
      target: shapes, types and shardings of the state.
      accept: called with the metadata before anything else is read; raises if it does not fit.

    Raises:
      DamagedError: in every process, if one of them cannot read it.
      UserError: see `read_state`.
    """
    meta = _by_all(lambda: read_meta(_seen(path)))
    accept(meta)
    _by_all(lambda: _check_files(path))  # so that all of them begin with the state, or none
    return _by_all(lambda: read_state(path, target, meta, checked=True)), meta


def _by_all(read: Callable[[], Any]) -> Any:
    """What a function returns; raises DamagedError in every process if it does in one."""
    found, failed = None, None
    try:
        found = read()
    except DamagedError as error:
        failed = error
    if distributed.all_max(int(failed is not None)):
        raise failed or DamagedError("another process cannot read it, see its host")
    return found


def _seen(path: Path, seconds: float = 60.0) -> Path:
    """The path, once it is there; on NFS another host may not see a new directory at once."""
    deadline = time.monotonic() + seconds
    while not storage.is_directory(path) and time.monotonic() < deadline:
        time.sleep(0.5)
    return path


def read_state(
    path: Path, target: Any, meta: dict[str, Any], *, alone: bool = False, checked: bool = False
) -> Any:
    """The state of one checkpoint, every leaf and every file verified.

    Args:
      path: the checkpoint's directory.
      target: shapes, types and shardings of the state.
      meta: see `read_meta`.
      alone: whether this process reads it onto its own devices; otherwise all processes read it
        together.
      checked: whether `_check_files` has been called.

    Raises:
      DamagedError: names the first file that differs or, if no file differs or there are no digests
        of files because of a crash, the first leaf.
      UserError: it is undamaged, but of another network or optimiser than the target.
    """
    if not checked:
        _check_files(path)
    try:
        _check_shapes(path, _saved_tree(path), target)
        with _reader(alone) as reader:
            state = reader.restore((path / "state").absolute(), target)
    except (UserError, DamagedError):
        raise
    except Exception as error:  # errors of all types
        raise DamagedError(f"its state cannot be read ({reason(error)})") from error
    for leaf, digest in digests(state).items():
        if meta["digests"].get(leaf) != digest:
            raise DamagedError(f"{leaf} does not match its digest")
    return state


def _check_files(path: Path) -> None:
    """Raises DamagedError if a file has changed: the stores cannot handle damaged bytes."""
    try:
        wrong = next(_wrong_files(path), None)
    except OSError as error:
        raise DamagedError(f"its files cannot be read ({reason(error)})") from error
    if wrong is not None:
        raise DamagedError(f"{wrong} does not match its digest")


def newest(directory: Path) -> Path:
    """The newest checkpoint in a directory of them.

    Raises:
      UserError: there is none.
    """
    steps = steps_in(directory)
    if not steps:
        raise UserError(f"{directory} has no finished checkpoint yet")
    return directory / str(steps[0])


def saved_class_names(directory: Path) -> tuple[str, ...]:
    """The classes of the outputs in the newest readable checkpoint of a directory; else none."""
    for step in steps_in(directory):
        with contextlib.suppress(DamagedError):
            return tuple(read_meta(directory / str(step))["class_names"])
    return ()


def read_variables(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The network's `params` and `batch_stats` of one checkpoint, verified.

    They are on one device of this process; other processes need not read them too.

    Args:
      path: the checkpoint's directory.
      meta: see `read_meta`.

    Raises:
      DamagedError: see `read_state`.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), _saved_tree(path)
    )
    state = read_state(path, target, meta, alone=True)
    return {name: state[name] or {} for name in ("params", "batch_stats")}


def _reader(alone: bool) -> ocp.StandardCheckpointer:
    if not alone:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


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
                f"{there.get(name, 'missing')} there, but {wanted.get(name, 'missing')} with this "
                "config; give the config and version that it was saved with, or another --workdir"
            )


def write_sums(path: Path) -> None:
    """Writes the digests of all files of a checkpoint into it, before it is renamed.

    Raises:
      FileNotFoundError: its files are gone, as its workdir was moved or removed. Were the directory
        created again, Orbax would finish a checkpoint without a state.
    """
    sums = {
        name: storage.sha256_of_file(path / name)
        for name in storage.files_below(path)
        if name not in _LATE
    }
    if _META not in sums:
        raise FileNotFoundError(errno.ENOENT, "its files have been moved or removed", str(path))
    storage.write(path / SUMS, json.dumps(sums), parents=False)


def steps_in(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, the newest first."""
    numbers = (n for n in storage.names(directory) if re.fullmatch("0|[1-9][0-9]*", n))
    return sorted((int(n) for n in numbers if storage.is_directory(directory / n)), reverse=True)


def _wrong_files(path: Path) -> Iterator[str]:
    """Files that differ from their digests; none if there are no digests.

    Up to version 0.1, digests were written after the checkpoint was renamed.
    """
    if not storage.exists(path / SUMS):
        return
    try:
        sums = json.loads(storage.read(path / SUMS))
    except ValueError:
        yield SUMS
        return
    if not isinstance(sums, dict) or _META not in sums:
        yield SUMS
        return
    # Other files there (such as a file manager's) do no harm.
    for name, digest in sums.items():
        file = path / name
        if not storage.is_file(file) or storage.sha256_of_file(file) != digest:
            yield name


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

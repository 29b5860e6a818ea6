"""Checkpoints that are verified when they are read.

A checkpoint directory holds, under the step's number, Orbax's `state` (the train state), `meta`
(JSON: format version, config, class names, preprocessing, a digest of every leaf) and
`sha256.json` (a digest of every file). Orbax and its stores detect hardly any damage by
themselves: of 100 single flipped bits they restored 94 without a word, 90 of them to wrong numbers.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from resnet_flax import distributed
from resnet_flax.errors import UserError

FORMAT = 1
SUMS = "sha256.json"


class DamagedError(Exception):
    """A checkpoint's bytes are not those that were saved; the message names what differs."""


def digests(tree: Any) -> dict[str, int]:
    """An integer checksum of every leaf, by path: computed on the devices, however it is cut.

    Each 32 bits of a leaf are hashed together with their position, and the hashes are summed
    modulo 2**32. The sum does not depend on its order, so neither on the sharding. Since the
    hash is a bijection for every position, a change of any one element changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One after another: a hundred programs with collectives under way at once can starve each
    # other of threads on XLA's CPU backend, which then aborts.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(_digest(leaf))
        for path, leaf in leaves
    }


@jax.jit
def _digest(leaf: Array) -> UInt32[Array, ""]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # not a reshape, which would move sharded data
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return _mix(bits ^ _mix(position + jnp.uint32(1))).sum(dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32 bits whose every output bit depends on every input bit.

    Constants: C. Wellons, "Prospecting for hash functions", lowbias32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the newest `keep` kept.

    Use as a context; leaving it waits for the save under way.

    Args:
      directory: made when first saved into.
      keep: number of checkpoints kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # the error under way matters more than this one
                raise
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def steps(self) -> list[int]:
        """Steps of finished checkpoints, the newest first."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        steps = (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        return sorted(steps, reverse=True)

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Saves in the background; returns when the state's buffers may change.

        Args:
          step: names the checkpoint.
          state: arrays.
          about: JSON that is saved beside it.

        Raises:
          UserError: this save or the one before failed; its leavings are removed.
        """
        self.wait()
        self._check_room(step, state)
        meta = {**about, "format": FORMAT, "step": step, "digests": digests(state)}
        meta["sha256"] = _sha256_of(meta)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self._saving = step
        try:
            self._open().save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def poll(self) -> None:
        """Finishes the save under way if nothing of it is left to wait for; cheap."""
        waiting = self._manager is not None and self._saving is not None
        if waiting and not self._manager.is_saving_in_progress():  # type: ignore[union-attr]
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises UserError where it failed."""
        if self._manager is None or self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._write_sums()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def restore_newest(
        self, target: Any, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[Any, dict[str, Any], list[str]] | None:
        """Restores the newest checkpoint that is whole, or None where there is none at all.

        Damaged ones are moved to a directory `damaged` beside this one, so that their steps can
        be saved again.

        Args:
          target: shapes, types and shardings of the state.
          accept: called with the metadata before anything is restored or moved; raises where it
            belongs to another experiment.

        Returns:
          The state, the metadata, and a sentence on each damaged checkpoint passed over.

        Raises:
          UserError: every checkpoint is damaged.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            path = self.directory / str(step)
            try:
                meta = read_meta(path)
                accept(meta)
                state = read_state(path, target, meta)
            except DamagedError as error:
                damaged[step] = f"checkpoint {path} is damaged: {error}"
                continue
            if distributed.is_first():
                self._set_aside(damaged)
            distributed.wait()
            return state, meta, list(damaged.values())
        if damaged:
            raise UserError(
                "; ".join(damaged.values())
                + "; no whole one is left: bring one back or start anew in another --workdir"
            )
        return None

    def _open(self) -> ocp.CheckpointManager:
        # Not before the first save: opening reads every checkpoint, damaged ones too, and makes
        # the directory.
        if self._manager is None:
            _silence_stores()
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True
            )
            handlers = {"state": _whole_arrays(), "meta": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
        return self._manager

    def _check_room(self, step: int, state: Any) -> None:
        # Not all full disks are seen here (quotas are not), but those that are end in peace.
        self.directory.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 1_000_000
        if shutil.disk_usage(self.directory).free < needed:
            self._saving = step
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _write_sums(self) -> None:
        path = self.directory / str(self._saving)
        if jax.process_index() == 0 and path.is_dir():
            sums = {name: _sha256_of_file(path / name) for name in _files(path)}
            scratch = self.directory / f"{SUMS}.new"  # so that a crash leaves no torn file
            scratch.write_text(json.dumps(sums))
            os.replace(scratch, path / SUMS)

    def _failed(self, error: Exception) -> UserError:
        """Removes what a failed save left behind, and says what happened."""
        step, self._saving = self._saving, None
        for entry in self.directory.glob("*"):
            if entry.name.startswith(f"{step}.") or entry.name == f"{SUMS}.new":
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        left = [n for n in self.steps() if n != step]
        on = f"the newest whole one is of step {left[0]}" if left else "there is none yet"
        return UserError(
            f"cannot save the checkpoint of step {step} in {self.directory}: {_reason(error)}; "
            f"make room or mend it and run the same command again ({on})"
        )

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step in damaged:
            aside = self.directory.with_name("damaged")
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(self.directory / str(step), target)


def _whole_arrays() -> ocp.PyTreeCheckpointHandler:
    """Writes of each array what one replica holds.

    Orbax's default cuts the replicated ones over all devices that hold them, for which it compiles
    a program for each shape: twenty seconds in the first save of a small network.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


# Parts of the stores' work that are left, or have not begun, when another part has failed.
_LEFT = ("_read_array_index_and_device_put", "async_serialize_from_host.<locals>.write_fragment")


def _silence_stores() -> None:
    """Keeps what fails from saying so a hundred times over: it is raised, once, as well."""
    left = "|".join(map(re.escape, _LEFT))
    warnings.filterwarnings("ignore", f"coroutine '({left})' was never awaited", RuntimeWarning)
    _silence_once()


@functools.cache
def _silence_once() -> None:
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda r: "never retrieved" not in r.getMessage())
    hook = sys.unraisablehook

    def quieter(unraisable: Any) -> None:
        left = getattr(unraisable.object, "__qualname__", "") in _LEFT
        if not left and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = quieter


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of one checkpoint.

    Raises:
      DamagedError: its bytes are not those that were saved.
      UserError: a later version of this package wrote it.
    """
    try:
        meta = json.loads((path / "meta" / "metadata").read_bytes())
        claimed = meta.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"its metadata cannot be read ({_reason(error)})") from error
    if _sha256_of(meta) != claimed:
        raise DamagedError("its metadata does not match its digest")
    if meta["format"] > FORMAT:
        raise UserError(
            f"checkpoint {path} is of format {meta['format']}, this version of resnet_flax reads "
            f"up to {FORMAT}; use a newer version"
        )
    return dict(meta)


def read_state(path: Path, target: Any, meta: dict[str, Any]) -> Any:
    """The state of one checkpoint, every leaf and every file verified.

    Args:
      path: the checkpoint's directory.
      target: shapes, types and shardings of the state.
      meta: see `read_meta`.

    Raises:
      DamagedError: naming the first file that differs or, where the files are as they were
        written or a crash came before their digests, the first leaf.
    """
    # First, since the stores are not made for damaged bytes and may say a great deal.
    try:
        wrong = next(_wrong_files(path), None)
    except OSError as error:
        raise DamagedError(f"its files cannot be read ({_reason(error)})") from error
    if wrong is not None:
        raise DamagedError(f"{wrong} does not match its digest")
    _silence_stores()
    try:
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore((path / "state").absolute(), target)
    except Exception as error:  # of all kinds
        raise DamagedError(f"its state cannot be read ({_reason(error)})") from error
    for leaf, digest in digests(state).items():
        if meta["digests"].get(leaf) != digest:
            raise DamagedError(f"{leaf} does not match its digest")
    return state


def newest(directory: Path) -> Path:
    """The newest checkpoint in a directory of them.

    Raises:
      UserError: there is none.
    """
    steps = Checkpoints(directory, 1).steps()
    if not steps:
        raise UserError(f"{directory} holds no finished checkpoint yet")
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
    _silence_stores()
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata((path / "state").absolute()).item_metadata.tree
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), saved
        )
    except Exception as error:  # of all kinds
        raise DamagedError(f"its state cannot be read ({_reason(error)})") from error
    state = read_state(path, target, meta)
    return {name: state[name] or {} for name in ("params", "batch_stats")}


def _wrong_files(path: Path) -> Iterator[str]:
    """Files that differ from the sums; none where a crash came before these were written."""
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
    # What else lies there (a file manager's, say) is nobody's harm.
    for name, digest in sums.items():
        if not (path / name).is_file() or _sha256_of_file(path / name) != digest:
            yield name


def _files(path: Path) -> list[str]:
    found = (file for file in path.rglob("*") if file.is_file() and file.name != SUMS)
    return sorted(str(file.relative_to(path)) for file in found)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """One line of an error, or of what caused it: the stores' own run over many."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    for known in ("No space left on device", "File too large", "Read-only file system"):
        if known in text:
            return known
    return (text.splitlines() or [type(error).__name__])[0][:200]

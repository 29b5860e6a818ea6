"""The checkpoints of a run: saved in the background, on the disk before the older ones go."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed, storage
from resnet_flax.training.checkpoint_files import (
    FORMAT,
    DamagedError,
    read_meta,
    read_state,
    reason,
    steps_in,
    write_sums,
)
from resnet_flax.training.digests import digests, sha256_of
from resnet_flax.training.quiet import silence_stores

# Orbax's name of a directory that it still writes into ends so.
_UNFINISHED = ocp.path.atomicity.TMP_DIR_SUFFIX
# Of a checkpoint that is saved once more, until that is on the disk.
_REPLACED = ".replaced"


class SaveError(UserError):
    """A checkpoint could not be saved; the message says why and which one is left.

    Attributes:
      what: the message without the one that is left.
    """

    def __init__(self, what: str, left: str) -> None:
        super().__init__(f"{what} ({left})")
        self.what = what


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the newest `keep` kept.

    A power failure at any time leaves the newest checkpoint that was finished, or the one before:
    every file is synced, then every directory upwards, then the checkpoint gets its name, that is
    synced too, and only then is an older one deleted.

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
        except SaveError:
            if kind is None:  # the error under way matters more than this one
                raise
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def steps(self) -> list[int]:
        """Steps of finished checkpoints, the newest first."""
        return steps_in(self.directory)

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Saves in the background; returns when the state's buffers may change.

        Args:
          step: names the checkpoint; one of that name is replaced.
          state: arrays.
          about: JSON that is saved beside it.

        Raises:
          SaveError: this save or the one before failed; its leavings are removed.
        """
        self.wait()
        self._check_room(step, state)
        meta = {**about, "format": FORMAT, "step": step, "digests": digests(state)}
        meta["sha256"] = sha256_of(meta)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        self._saving = step
        try:
            self._lay_aside(step)
            self._open().save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def poll(self) -> None:
        """Finishes the save under way if nothing of it is left to wait for; cheap."""
        waiting = self._manager is not None and self._saving is not None
        if waiting and not self._manager.is_saving_in_progress():  # type: ignore[union-attr]
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is on the disk; raises SaveError where it failed."""
        if self._manager is None or self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if distributed.is_primary():
                # Its files are synced; now its name, and what Orbax wrote after `_before_its_name`.
                path = self.directory / str(self._saving)
                for entry in path.iterdir():
                    if entry.is_file():
                        storage.sync_file(entry)
                storage.sync_directory(path)
                storage.sync_directory(self.directory)
                self._remove_replaced()
            for old in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(old)
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
          UserError: every checkpoint is damaged, or one is of another network.
        """
        if distributed.is_primary():
            self._bring_back()
        distributed.barrier()
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
            if distributed.is_primary():
                self._set_aside(damaged)
            distributed.barrier()
            return state, meta, list(damaged.values())
        if damaged:
            raise UserError(
                "; ".join(damaged.values())
                + "; no whole one is left: bring one back or start again in another --workdir"
            )
        return None

    def _open(self) -> ocp.CheckpointManager:
        # Not before the first save: opening reads every checkpoint, damaged ones too, and makes
        # the directory.
        if self._manager is None:
            silence_stores()
            storage.make_directory(self.directory)
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_its_name
                ),
            )
            handlers = {"state": _whole_arrays(), "meta": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
        return self._manager

    def _before_its_name(self) -> None:
        """What is done to a checkpoint, by the first process, before Orbax renames it."""
        path = self.directory / f"{self._saving}{_UNFINISHED}"
        write_sums(path)
        storage.sync_tree(path)

    def _check_room(self, step: int, state: Any) -> None:
        # Not all full disks are seen here (quotas are not), but those that are end in peace.
        storage.make_directory(self.directory)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 1_000_000
        if shutil.disk_usage(self.directory).free < needed:
            self._saving = step
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _failed(self, error: Exception) -> SaveError:
        """Removes what a failed save left behind, and says what happened."""
        step, self._saving = self._saving, None
        for entry in self.directory.glob(f"{step}.*"):
            if entry.name != f"{step}{_REPLACED}":
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        self._bring_back()
        left = [n for n in self.steps() if n != step]
        on = f"the newest whole one is of step {left[0]}" if left else "there is none yet"
        return SaveError(
            f"cannot save the checkpoint of step {step} in {self.directory}: {reason(error)}; "
            "make room or mend it and run the same command again",
            on,
        )

    def _lay_aside(self, step: int) -> None:
        """Gives the checkpoint of a step that is saved once more another name for that time."""
        path = self.directory / str(step)
        if distributed.is_primary() and path.is_dir():
            os.replace(path, self.directory / f"{step}{_REPLACED}")
        distributed.barrier()
        if self._manager is not None:
            self._manager.reload()

    def _bring_back(self) -> None:
        """Undoes `_lay_aside` where the save that was to replace a checkpoint did not finish."""
        for entry in self.directory.glob(f"*{_REPLACED}"):
            path = self.directory / entry.name.removesuffix(_REPLACED)
            if path.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.replace(entry, path)

    def _remove_replaced(self) -> None:
        shutil.rmtree(self.directory / f"{self._saving}{_REPLACED}", ignore_errors=True)

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

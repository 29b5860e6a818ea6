"""The checkpoints of a run: saved in the background, synced before older ones are deleted."""

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

# The suffix of directories that Orbax is still writing.
_UNFINISHED = ocp.path.atomicity.TMP_DIR_SUFFIX
# The suffix of a checkpoint that is being replaced, until the new one is on the disk.
_REPLACED = ".replaced"


class SaveError(UserError):
    """A checkpoint could not be saved; the message says why, and which is the newest.

    Attributes:
      what: the message without the newest checkpoint.
    """

    def __init__(self, what: str, left: str) -> None:
        super().__init__(f"{what} ({left})")
        self.what = what


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, the newest `keep` kept.

    After a power failure at any time there is the newest finished checkpoint, or the one before:
    every file is synced, then every directory upwards, then the checkpoint is renamed and the name
    synced, and only then is an older one deleted.

    Use it as a context; leaving it waits for the save in progress.

    Args:
      directory: created by the first save.
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
            if kind is None:  # the current error matters more than this one
                raise
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def steps(self) -> list[int]:
        """Steps of finished checkpoints, the newest first."""
        return steps_in(self.directory)

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Saves in the background; when it returns, the state's buffers may change.

        Args:
          step: names the checkpoint; an existing one is replaced.
          state: arrays.
          about: JSON that is saved with it.

        Raises:
          SaveError: this save or the one before failed; its incomplete files are removed.
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
        """Finishes the save in progress if that needs no waiting; cheap."""
        waiting = self._manager is not None and self._saving is not None
        if waiting and not self._manager.is_saving_in_progress():  # type: ignore[union-attr]
            self.wait()

    def wait(self) -> None:
        """Returns when the save in progress is on the disk; raises SaveError if it failed."""
        if self._manager is None or self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if distributed.is_primary():
                # Its files are synced; now sync its name, and what Orbax wrote after
                # `_before_its_name`.
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
        """Restores the newest undamaged checkpoint; returns None if there are no checkpoints.

        Damaged ones are moved to a directory `damaged` next to this one, so that their steps can be
        saved again.

        Args:
          target: shapes, types and shardings of the state.
          accept: called with the metadata before anything is restored or moved; raises if it
            belongs to another experiment.

        Returns:
          The state, the metadata, and a sentence on each damaged checkpoint that was skipped.

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
                + "; no undamaged one is left: restore one or start again in another --workdir"
            )
        return None

    def _open(self) -> ocp.CheckpointManager:
        # Only at the first save: opening reads every checkpoint, damaged ones too, and creates the
        # directory.
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
        """What the first process does to a checkpoint before Orbax renames it."""
        path = self.directory / f"{self._saving}{_UNFINISHED}"
        write_sums(path)
        storage.sync_tree(path)

    def _check_room(self, step: int, state: Any) -> None:
        # Some full disks, such as by quotas, are not detected here; the others fail cleanly.
        storage.make_directory(self.directory)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 1_000_000
        if shutil.disk_usage(self.directory).free < needed:
            self._saving = step
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _failed(self, error: Exception) -> SaveError:
        """Removes the files of a failed save, and returns the error."""
        step, self._saving = self._saving, None
        for entry in self.directory.glob(f"{step}.*"):
            if entry.name != f"{step}{_REPLACED}":
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        self._bring_back()
        left = [n for n in self.steps() if n != step]
        on = f"the newest one is of step {left[0]}" if left else "there is none yet"
        return SaveError(
            f"cannot save the checkpoint of step {step} in {self.directory}: {reason(error)}; "
            "free space or fix the cause, and run the same command again",
            on,
        )

    def _lay_aside(self, step: int) -> None:
        """Renames an existing checkpoint while its step is saved again."""
        path = self.directory / str(step)
        if distributed.is_primary() and path.is_dir():
            os.replace(path, self.directory / f"{step}{_REPLACED}")
        distributed.barrier()
        if self._manager is not None:
            self._manager.reload()

    def _bring_back(self) -> None:
        """Undoes `_lay_aside` if the save that was to replace the checkpoint did not finish."""
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
    """A handler that writes one replica of each array.

    By default Orbax splits replicated arrays over their devices, and compiles a program for each
    shape to do so, which takes twenty seconds in the first save of a small network.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)

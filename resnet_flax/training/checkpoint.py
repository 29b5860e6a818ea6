"""The checkpoints of a run: saved in the background, synced before older ones are deleted."""

import contextlib
import time
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
    read_together,
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
    """A checkpoint could not be saved; the message says why, what to do, and which is the newest.

    Attributes:
      why: which could not be saved, and why.
      what: the message without the newest checkpoint.
    """

    def __init__(self, why: str, left: str) -> None:
        what = f"{why}; free space or fix the cause, and run the same command again"
        super().__init__(f"{what} ({left})")
        self.why, self.what = why, what


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
        try:
            self._lay_aside(step)
            self._open().save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def poll(self) -> None:
        """Finishes the save in progress if that needs no waiting; cheap in one process.

        It is a collective: deleting older checkpoints is a barrier, which would wait for a step's
        collectives, and they for it, if another process saw the end of the save after that step.
        """
        if self._manager is None or self._saving is None:
            return
        if not distributed.all_max(int(self._manager.is_saving_in_progress())):
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
                for name in storage.names(path):
                    if storage.is_file(path / name):
                        storage.sync_file(path / name)
                storage.sync_directory(path)
                storage.sync_directory(self.directory)
                self._remove_replaced()
            for old in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(old)
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def restore_newest(
        self, target: Any, accept: Callable[[dict[str, Any]], None], multiple_of: int = 0
    ) -> tuple[Any, dict[str, Any], list[str]] | None:
        """Restores the newest undamaged checkpoint; returns None if there are no checkpoints.

        Damaged ones are moved to a directory `damaged` next to this one, so that their steps can be
        saved again.

        Args:
          target: shapes, types and shardings of the state.
          accept: called with the metadata before anything is restored or moved; raises if it
            belongs to another experiment.
          multiple_of: not 0 to prefer checkpoints whose step is a multiple.

        Returns:
          The state, the metadata, and a sentence on each damaged checkpoint that was skipped.

        Raises:
          UserError: every checkpoint is damaged, or one is of another network.
        """
        if distributed.is_primary():
            self._bring_back()
        distributed.barrier()
        damaged: dict[int, str] = {}
        # A stable sort: the newest first among the preferred ones, and among the others.
        left = sorted(self.steps(), key=lambda step: multiple_of and step % multiple_of != 0)
        # All processes read the same one: another host may not see the newest yet.
        for _ in range(distributed.of_the_first(len(left))):
            step = distributed.of_the_first(left.pop(0) if left else 0)
            path = self.directory / str(step)
            try:
                state, meta = read_together(path, target, accept)
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

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, from which nothing shall continue."""
        if distributed.is_primary():
            for later in self.steps():
                if later > step:
                    storage.remove(self.directory / str(later))
            storage.sync_directory(self.directory)
        distributed.barrier()

    def _open(self) -> ocp.CheckpointManager:
        # Only at the first save: opening reads every checkpoint, damaged ones too, and creates the
        # directory.
        if self._manager is None:
            silence_stores()
            storage.make_directory(self.directory)
            options = ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_its_name,
                    # Otherwise, if a directory cannot be created, threads wait for it for minutes.
                    create_directories_asynchronously=False,
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
        self._saving = step
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 1_000_000
        try:
            storage.make_directory(self.directory)
            storage.check_room(self.directory, needed)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SaveError:
        """Removes the files of a failed save, and returns the error."""
        step, self._saving = self._saving, None
        if jax.process_count() == 1:  # several would wait for each other
            manager, self._manager = self._manager, None
            # Its threads may still write into the directory that is removed here.
            for finish in (manager.wait_until_finished, manager.close) if manager else ():
                with contextlib.suppress(Exception):
                    finish()
        if distributed.is_primary():
            self._remove_parts(step)
            self._bring_back()
        left = [n for n in self.steps() if n != step]
        on = f"the newest one is of step {left[0]}" if left else "there is none yet"
        return SaveError(
            f"cannot save the checkpoint of step {step} in {self.directory}: {reason(error)}", on
        )

    def _remove_parts(self, step: int | None) -> None:
        for _ in range(20):  # a thread of a failed save may create one more file
            names = [n for n in storage.names(self.directory) if n.startswith(f"{step}.")]
            found = [name for name in names if not name.endswith(_REPLACED)]
            if not found:
                break
            for name in found:
                storage.remove(self.directory / name)
            time.sleep(0.05)

    def _lay_aside(self, step: int) -> None:
        """Renames an existing checkpoint while its step is saved again."""
        path = self.directory / str(step)
        if distributed.is_primary() and storage.is_directory(path):
            storage.rename(path, self.directory / f"{step}{_REPLACED}")
        distributed.barrier()
        if self._manager is not None:
            self._manager.reload()

    def _bring_back(self) -> None:
        """Undoes `_lay_aside` if the save that was to replace the checkpoint did not finish."""
        for name in storage.names(self.directory):
            if name.endswith(_REPLACED):
                path = self.directory / name.removesuffix(_REPLACED)
                if storage.is_directory(path):
                    storage.remove(self.directory / name)
                else:
                    storage.rename(self.directory / name, path)

    def _remove_replaced(self) -> None:
        storage.remove(self.directory / f"{self._saving}{_REPLACED}")

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step in damaged:
            aside = self.directory.with_name("damaged")
            storage.make_directory(aside)
            target = aside / str(step)
            storage.remove(target)
            storage.rename(self.directory / str(step), target)


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

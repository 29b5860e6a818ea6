"""Files that are written atomically, names, and directories."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resnet_flax.runtime.storage.errors import naming
from resnet_flax.runtime.storage.syncing import sync_directory, sync_file


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, and syncs their names."""
    missing = [parent for parent in (path, *path.parents) if not parent.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_directory(made.parent)


def write(path: Path, content: str | bytes, *, parents: bool = True) -> None:
    """Writes a file atomically: even after a power failure it is the old or the new one.

    Args:
      path: of the file.
      content: text is encoded as UTF-8.
      parents: create missing directories; otherwise they raise FileNotFoundError.
    """
    with _replacing(path, parents=parents) as new, naming(path), new.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_by(path: Path, save: Callable[[Path], object]) -> None:
    """Writes a file atomically, see `write`, by a function that saves to a path."""
    with _replacing(path) as new:
        save(new)
        sync_file(new)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, see `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def rename(old: Path, new: Path) -> None:
    """Renames a file or directory, atomically; the names are not synced."""
    os.replace(old, new)


def remove(path: Path) -> None:
    """Removes a file, or a directory and all that can be removed in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def probe_directory(directory: Path) -> None:
    """Raises OSError unless files can be written in a directory, which is created if missing."""
    make_directory(directory)
    probe = directory / _own_name()
    probe.write_text("yes")
    probe.unlink()


def probe_file(path: Path) -> None:
    """Raises OSError unless a file can be written; leaves nothing there, and an old file as it is.

    Everything is tried under names of its own, as another process may be writing that file, or
    creating its directory, at the same time.
    """
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))  # does not create it
    # As `write` does, whose name is longer and needs a directory that can be written.
    new = _beside(path)
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    first = missing[-1] if missing else new
    own = first.with_name(_own_name(first.name))
    probe = own / new.relative_to(first)
    try:
        if missing:
            probe.parent.mkdir(parents=True)
        probe.open("xb").close()
    finally:
        with contextlib.suppress(OSError):
            remove(own)


def _own_name(name: str = "") -> str:
    """A name that no other process uses, at least as long as `name`."""
    return f".writable-{secrets.token_hex(8)}".ljust(len(os.fsencode(name)), "_")


@contextlib.contextmanager
def _replacing(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A context in which a new file is written, which then replaces the one at `path`."""
    if parents:
        make_directory(path.parent)
    new = _beside(path)
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.new")

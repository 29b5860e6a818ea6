"""Files that survive a power failure.

A file's bytes, and its name in a directory, are only in the kernel's memory until they are synced,
for up to half a minute on Linux. Everything in a workdir is written through this module.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

# Errors of the user's machine, not of this program.
OF_THE_MACHINE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}

# Errors of file systems that cannot sync a directory.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def make_directory(path: Path) -> None:
    """Creates a directory and its parents, and syncs their names."""
    missing = [parent for parent in (path, *path.parents) if not parent.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_directory(made.parent)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: even after a power failure it is the old or the new one."""
    make_directory(path.parent)
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, see `write`."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None if the file is missing or cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sync_file(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def sync_tree(path: Path) -> None:
    """Returns when all files below a directory, then the directories upwards, are on the disk."""
    for directory, _, files in os.walk(path, topdown=False):
        for name in files:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))

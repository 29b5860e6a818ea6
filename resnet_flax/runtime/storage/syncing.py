"""Until bytes and names are on the disk."""

import errno
import os
from pathlib import Path

# Errors of file systems that cannot sync a directory.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


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

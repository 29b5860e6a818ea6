"""Errors of the user's machine, such as a full disk."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

# Error numbers that are due to the machine, not to this program.
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
    errno.ESTALE,
}


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """A context whose OSErrors name a file; those of a full disk name none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error

"""What is in a workdir."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def exists(path: Path) -> bool:
    """Whether there is a file or a directory."""
    return path.exists()


def is_file(path: Path) -> bool:
    """Whether there is a file."""
    return path.is_file()


def is_directory(path: Path) -> bool:
    """Whether there is a directory."""
    return path.is_dir()


def names(directory: Path) -> list[str]:
    """Names of the files and directories in a directory, sorted; none if it is missing."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def files_below(directory: Path) -> list[str]:
    """Paths of all files below a directory, relative to it, sorted."""
    found = (Path(parent, name) for parent, _, files in os.walk(directory) for name in files)
    return sorted(str(path.relative_to(directory)) for path in found if path.is_file())


def read(path: Path) -> bytes:
    """The contents of a file; raises OSError if it cannot be read."""
    return path.read_bytes()


def read_json(path: Path, kind: type = dict) -> Any:
    """What `write_json` wrote; None if the file is missing, damaged or holds something else.

    Args:
      path: of the file.
      kind: of the value: dict for an object, list for a list of objects.
    """
    try:
        value = json.loads(read(path))
    except (OSError, ValueError, RecursionError):
        return None
    whole = not isinstance(value, list) or all(isinstance(item, dict) for item in value)
    return value if isinstance(value, kind) and whole else None


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(directory: Path, needed: int) -> None:
    """Raises OSError unless a directory's disk has so many free bytes; a quota may allow less."""
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

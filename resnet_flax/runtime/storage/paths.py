"""From addresses to paths."""

import re
import urllib.parse
from pathlib import Path

from resnet_flax.errors import UserError

# How addresses that are no paths begin; `Path` makes one slash of two.
_REMOTE = re.compile(r"(gs|s3|az|abfss?|hdfs|hf|https?|ftp):/", re.IGNORECASE)

# Group 1: the host, if there is one.
_FILE = re.compile("file:(?://([^/]*)(?:/|$)|/)", re.IGNORECASE)


def local(path: str | Path) -> Path:
    """The path that a person gave, which may begin with ~ or file://.

    Raises:
      UserError: it is an address on an object store or another host.
    """
    text = str(path)
    remote = _REMOTE.match(text)
    if remote:
        raise UserError(
            f"{remote[1]}:// is not supported, in {text}; give a path on a disk or a mounted file "
            "system"
        )
    address = _FILE.match(text)
    if address and (address[1] or "localhost").lower() != "localhost":
        raise UserError(
            f"{text} is on another host, {address[1]}; give a path on a disk or a mounted file "
            "system, such as file:///PATH"
        )
    if address:
        text = "/" + urllib.parse.unquote(text[address.end() :]).lstrip("/")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~ or ~NAME without a home directory
        raise UserError(f"{text} cannot be resolved: {error}; give the whole path") from error

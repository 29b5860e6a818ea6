"""Keeps Orbax, and the stores that it writes to, from repeating what is raised as well."""

import functools
import logging
import re
import sys
import warnings
from typing import Any

# Parts of the stores' work that are left, or have not begun, when another part has failed.
_LEFT = ("_read_array_index_and_device_put", "async_serialize_from_host.<locals>.write_fragment")


def silence_stores() -> None:
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

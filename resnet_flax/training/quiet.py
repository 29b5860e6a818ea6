"""Silences repeated messages of Orbax and its stores about errors that are raised anyway."""

import functools
import logging
import re
import sys
import warnings
from typing import Any

# Tasks of the stores that are unfinished, or have not begun, when another task has failed.
_LEFT = ("_read_array_index_and_device_put", "async_serialize_from_host.<locals>.write_fragment")


def silence_stores() -> None:
    """Keeps a failure from being printed a hundred times; it is also raised, once."""
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

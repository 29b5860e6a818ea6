"""Errors that are reported to the user as one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input or machine causes it; the message is one sentence that says what to do.

    The command line prints it without a traceback and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def closest(word: str, words: Iterable[str]) -> str:
    """The words nearest to `word` as '; did you mean ...?'; empty if none is near."""
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""

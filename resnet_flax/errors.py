"""Errors that are reported to the user as one sentence."""

import difflib
import itertools
import unicodedata
from collections.abc import Collection, Iterable, Mapping

# Unicode's categories and directions of characters that break, garble or reorder a line.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


class UserError(ValueError):
    """The user's input or machine causes it; the message is one sentence that says what to do.

    The command line prints it without a traceback and exits with 2.
    """


class SettingError(UserError):
    """An error that names a setting, which is called differently where it is told.

    What a config calls `data.size` is a flag of one verb, and another verb has nothing like it. So
    each verb has words of its own for the settings that its errors can name, see `cli.words`.

    Attributes:
      said: the beginning of the sentence.
      setting: what it names.
      words: its end, for a run with a config or, where a run has no such setting, in Python.
    """

    def __init__(self, said: str, setting: str, words: str = "") -> None:
        super().__init__(said, setting, words)  # readers are processes, which pickle it
        self.said, self.setting, self.words = said, setting, words or setting

    def __str__(self) -> str:
        return self.told({})

    def told(self, words: Mapping[str, str]) -> str:
        """The sentence, with other words at its end if there are some for the setting."""
        return f"{self.said} {words.get(self.setting, self.words)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(names: Collection[str], most: int = 3) -> str:
    """Names in a sentence: the first few, and how many more there are."""
    shown = ", ".join(itertools.islice(names, most))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def closest(word: str, words: Iterable[str]) -> str:
    """The words nearest to `word` as '; did you mean ...?'; empty if none is near."""
    words = list(words)
    same = [one for one in words if one.casefold() == word.casefold()]
    near = same or difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(name: object) -> str:
    """The name of a file as a message shows it: line breaks and control characters are escaped."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _ESCAPED
        or unicodedata.bidirectional(letter) in _REORDERING
        else letter
        for letter in str(name)
    )

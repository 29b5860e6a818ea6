"""Names of classes: their order, which of them are of the same class, and which cannot be used."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_flax.errors import UserError, shown
from resnet_flax.runtime import storage

# Longer names in digits, such as hashes, are no numbers of classes.
_DIGITS = 9
# Unicode's categories of characters that break a line or cannot be encoded.
_UNUSABLE = ("Cc", "Zl", "Zp", "Cs")


def composed(name: str) -> str:
    """The name in Unicode's normalization form C; macOS and Linux write "é" in different forms."""
    return unicodedata.normalize("NFC", name)


def numbers(names: Sequence[str]) -> list[int] | None:
    """The names as numbers, such as "0" or "007"; None unless all of them are different ones."""
    if not names or not all(name.isdecimal() and len(name) <= _DIGITS for name in names):
        return None
    found = [int(name) for name in names]
    return found if len(set(found)) == len(found) else None


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """The classes of directories: by number if all names are numbers, otherwise as text.

    Numbers are not sorted as text, so that class 2 comes before class 10 and, of classes numbered
    from 0, the position is the number. Names that differ in their Unicode form alone are one class.
    """
    found = sorted({composed(name) for name in names})
    return tuple(sorted(found, key=int) if numbers(found) else found)


def positions(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """For each of `names` the index of its class in `among`, None if it is not there.

    Names are compared as numbers if all on both sides are, so that "07" is "7"; otherwise in one
    Unicode form.
    """
    ours, theirs = _comparable(names, among)
    index = {key: i for i, key in reversed([*enumerate(theirs)])}
    return [index.get(key) for key in ours]


def same(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists have the same classes in the same order."""
    ours, theirs = _comparable(names, others)
    return ours == theirs


def _comparable(names: Sequence[str], others: Sequence[str]) -> tuple[list[Any], list[Any]]:
    ours, theirs = numbers(names), numbers(others)
    if ours is not None and theirs is not None:
        return ours, theirs
    return [*map(composed, names)], [*map(composed, others)]


def reordering(names: Sequence[str], others: Sequence[str]) -> list[int] | None:
    """Where each of `names` is in `others`, if these are the same classes in another order."""
    if len(names) != len(others) or same(names, others):
        return None
    found = [index for index in positions(names, others) if index is not None]
    return found if len(set(found)) == len(names) else None


def other_orders(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What other programs make of directories, where it is another order than that of the names."""
    orders = {
        "as text, as torchvision does": tuple(sorted(names)),
        "by the numbers in them, as timm does": tuple(sorted(names, key=_natural)),
    }
    return {how: order for how, order in orders.items() if order != tuple(names)}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names by value, and letters whatever their case."""
    return [(int(d or -1), text.lower()) for d, text in re.findall(r"(\d{1,9})|(\D+)", name)]


def unusable(name: str) -> bool:
    """Whether a name of a class has a line break, a control character, or no encoding."""
    return any(unicodedata.category(letter) in _UNUSABLE for letter in name)


def read(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line.

    Raises:
      UserError: it cannot be read, is not text, or a line is no name.
    """
    try:
        text = storage.read(path).decode("utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)} is not UTF-8 text") from error
    names = [composed(line.removesuffix("\r")) for line in text.split("\n")]
    for line, name in enumerate(names, start=1):
        if not name or unusable(name):
            raise UserError(f"line {line} of {shown(path)} is {name!a}, which is no name")
    return tuple(names)

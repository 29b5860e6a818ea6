"""Named values with a type and a range: config keys, attributes of networks, entries of tables.

A key has a default, which decides its type, and a rule that values must satisfy. The members of a
family, such as the optimizers, are a table: `Entry`s by name, each with the keys that it adds.
"""

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from resnet_flax.errors import UserError, closest

Value = bool | int | float | str | tuple[int | float, ...]
Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what it must be in words


class Key(NamedTuple):
    """A named value.

    Attributes:
      default: also decides the type: bool, int, float, str or a tuple of numbers. None and lists
        could not be overridden from the command line.
      meaning: in a sentence, for help pages.
      rule: what values must satisfy, if not all of the type are valid.
      resume_safe: whether the value may differ when a run is continued.
      former: the value of a run that was saved before the key existed; None if the default.
    """

    default: Value
    meaning: str
    rule: Rule | None = None
    resume_safe: bool = False
    former: Value | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A member of a table.

    Attributes:
      make: makes it; the table says from what.
      keys: the config keys that it adds, with their groups: {'optim.beta': Key(0.9, 'Decay.')}.
      check: raises UserError if values do not go together; gets those of all keys by name.
      automatic: what other keys are whose value is 'auto', by name.
    """

    make: Callable[..., Any]
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda flat: None
    automatic: Mapping[str, Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tables:
    """What a config can choose from.

    Attributes:
      choices: the table that a key chooses from, by the key; what follows a colon in its value is
        an argument of the entry ('folder:DIR').
      lists: the names that a key can list, by the key, with spaces between them.
      attributes: of networks that `model.overrides` can set.
    """

    choices: Mapping[str, Mapping[str, Entry]] = dataclasses.field(default_factory=dict)
    lists: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Key] = dataclasses.field(default_factory=dict)

    def keys(self) -> dict[str, Key]:
        """The keys of all entries.

        Raises:
          UserError: two entries declare a key differently.
        """
        found: dict[str, Key] = {}
        for name, entry in self._entries():
            for key, declared in entry.keys.items():
                _check_declared(key, declared, name)
                if found.setdefault(key, declared) != declared:
                    raise UserError(
                        f"the config key {key} of {name!r} is declared by another entry with "
                        "another default, meaning or rule; use the same Key, or another name"
                    )
        return found

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        for key, table in self.choices.items():
            for name, entry in table.items():
                if not isinstance(entry, Entry):
                    raise UserError(
                        f"{name!r}, which {key} could choose, is a {type(entry).__name__} and not "
                        "a resnet_flax.keys.Entry; write Entry(...) around it"
                    )
                yield name, entry


def _check_declared(name: str, key: Any, entry: str) -> None:
    """Raises UserError for what an entry declares as a key and is none."""
    said = f"the config key {name!r} of {entry!r}"
    if not isinstance(key, Key):
        raise UserError(f"{said} is declared by {key!r}; write Key(default, meaning)")
    if not all(part.isidentifier() for part in name.split(".")) or name.count(".") != 1:
        raise UserError(f"{said} must be of the form GROUP.NAME, such as 'optim.beta'")
    if type(key.default) not in EXPECTED:
        raise UserError(
            f"{said} has the default {key.default!r}; it must be a bool, int, float, str or tuple"
        )
    fits = key.rule is None or (isinstance(key.rule, tuple) and callable(key.rule[0]))
    if not fits:
        raise UserError(
            f"{said} has the rule {key.rule!r}; a rule is a function and what it asks for in "
            "words, such as resnet_flax.keys.POSITIVE"
        )
    checked(f"the default of {said}", key, key.default)


# What a value of each type must be, for errors.
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "numbers with commas between them, such as 0.3,0.4",
}

SEED = (lambda value: 0 <= value < 2**31, "at least 0 and less than 2**31")
COUNT = (lambda value: 0 < value < 2**31, "more than 0 and less than 2**31")
POSITIVE = (lambda value: value > 0, "more than 0")
NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
FRACTION = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
SHARE = (lambda value: 0 < value <= 1, "more than 0 and at most 1")
PROBABILITY = (lambda value: 0 <= value <= 1, "at least 0 and at most 1")
STEPS = (
    lambda value: all(
        type(b) is int and a < b < 2**31 for a, b in zip((0, *value), value, strict=False)
    ),
    "whole numbers, each more than the one before and less than 2**31",
)
SIDES = (
    lambda value: all(type(n) is int and 0 < n < 2**15 for n in value),
    "whole numbers, each more than 0 and less than 32768",
)
CHANNELS = (lambda value: value in (0, 1, 3, 4), "0, 1, 3 or 4")
PIXELS = (lambda value: 0 <= value < 2**15, "at least 0 and less than 32768")


def one_of(*words: str) -> Rule:
    """The rule of a key that takes one of a few words."""
    return lambda value: value in words, "one of " + ", ".join(words)


def parsed(text: str, kind: type) -> Any:
    """`text` as a value of `kind`; unchanged if it is not one, which `checked` rejects."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    if kind is tuple:
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3
    return value


def checked(name: str, key: Key, value: Any) -> Value:
    """The value in the key's type.

    Args:
      name: of the key, for the error: 'config key steps'.
      key: its type and rule.
      value: to check.

    Raises:
      UserError: it has another type, is not finite or does not satisfy the rule.
    """
    kind = type(key.default)
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if isinstance(value, tuple | list):
        whole = key.rule in (STEPS, SIDES)  # 1e3 is a whole number too
        value = tuple(
            int(n) if whole and isinstance(n, float) and n.is_integer() else n for n in value
        )
    numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
    is_number = [isinstance(n, int | float) and not isinstance(n, bool) for n in numbers]
    huge = kind is float and type(value) is int
    if not huge and (type(value) is not kind or (kind is tuple and not all(is_number))):
        raise UserError(f"{name} must be {_expected(key)}, not {value!r}")
    if any(isinstance(n, int | float) and not abs(n) < 1e300 for n in numbers):
        raise UserError(f"{name} takes finite numbers, not {value!r}")
    if key.rule is not None:
        valid, expected = key.rule
        if not valid(value):
            raise UserError(f"{name} must be {expected}, not {value!r}")
    if kind is int and abs(value) >= 2**31:
        raise UserError(f"{name} must be less than 2**31, not {value!r}")
    return value


def _expected(key: Key) -> str:
    """What a value must be: its type, or what its rule says if that implies the type."""
    says_it_all = key.rule is not None and key.rule[1].startswith(("one of", "a whole", "whole"))
    return key.rule[1] if key.rule and says_it_all else EXPECTED[type(key.default)]


def chosen(where: str, table: Mapping[str, Any], value: str) -> Any:
    """The entry of a table that a value names, without what follows a colon.

    Args:
      where: what the value is of, for the error: 'config key optim.loss'.
      table: by name.
      value: such as 'folder:DIR'.

    Raises:
      UserError: there is none; the error lists the names.
    """
    name = value.partition(":")[0]
    if name not in table:
        raise UserError(
            f"{where} must be one of {', '.join(table)}, not {value!r}{closest(name, table)}"
        )
    return table[name]


def words(text: str, where: str = "model.overrides") -> Iterator[tuple[str, str]]:
    """The names and values of `model.overrides`, such as 'shortcut=C stage_sizes=2,2,2,2'.

    Args:
      text: to be parsed.
      where: what the error calls it.

    Raises:
      UserError: a word is not of the form `name=value`, or a name is given twice.
    """
    seen = set()
    for word in text.split():
        name, equals, value = word.partition("=")
        if name in seen:
            raise UserError(f"{name} is given twice in {where}")
        if not equals:
            raise UserError(f"{where} are written name=value with spaces between, not {word!r}")
        seen.add(name)
        yield name, value

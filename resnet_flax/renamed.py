"""Former names and the current ones: what users have written is still read.

Config keys and attributes of networks were renamed on 2026-11-28. Where a person gives an old name,
a `RenamedWarning` says the new one; in files that this package has written it is taken silently.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from resnet_flax.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

CONFIG_KEYS = {
    "model.axes": "model.overrides",
    "model.norm_span": "model.bn_group_size",
    "data.colour": "data.pca_lighting",
}
# Attributes of `ResNet`, as `create_model` and a config's `model.overrides` take them.
ATTRIBUTES = {
    "norm_groups": "ghost_batches",
    "squeeze": "se_ratio",
    "squeeze_multiple": "se_divisor",
    "group_width": "width_per_group",
    "shortcut_pool": "avg_down",
}


# Entries of an example of a data source.
EXAMPLE_KEYS = {"accepted": "valid_labels"}


# In the paths of files that are not the user's.
_NOT_USERS = ("site-packages", str(Path(__file__).parent), "<")


class RenamedWarning(FutureWarning):
    """A former name was used."""


def current(name: str, names: Mapping[str, str], what: str) -> str:
    """The current name, with a warning if it is another.

    Args:
      name: as the user wrote it.
      names: the current name of each former one.
      what: is named, for the warning: 'config key'.
    """
    if name not in names:
        return name
    new = names[name]
    # The warning is of the user's line, which may be far up: Flax calls networks.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _NOT_USERS):
        level, frame = level + 1, frame.f_back
    said = f"the {what} {name} is called {new} now; use that"
    warnings.warn(said, RenamedWarning, stacklevel=level)
    return new


def keywords(values: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Any]:
    """Values under their current names, with a warning for each that had a former one.

    Args:
      values: by name, as the user wrote them.
      names: see `current`.
      what: see `current`.

    Raises:
      UserError: a value has its old and its new name, and the two differ.
    """
    found = {name: value for name, value in values.items() if name not in names}
    for old in (name for name in values if name in names):
        new = current(old, names, what)
        if new in found and found[new] != values[old]:
            raise UserError(f"{old} and {new} are the same {what}; give {new} alone")
        found[new] = values[old]
    return found


def attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a network that a file of this package stores, under their current names."""
    return {ATTRIBUTES.get(name, name): value for name, value in values.items()}


def saved_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A config with dotted keys that a file of this package stores, under the current names."""
    config = {CONFIG_KEYS.get(key, key): value for key, value in flat.items()}
    if "model.overrides" in config:
        config["model.overrides"] = overrides(
            config["model.overrides"], lambda name: ATTRIBUTES.get(name, name)
        )
    return config


def example(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example of a data source, which may be a user's own, under the current names."""
    if EXAMPLE_KEYS.keys().isdisjoint(entries):
        return entries
    return {
        current(name, EXAMPLE_KEYS, "entry of an example"): value for name, value in entries.items()
    }


def saved_settings(settings: Iterable[str]) -> list[str]:
    """Settings 'key=value' that a file of this package stores, under the current names."""
    return [f"{key}={value}" for key, value in saved_config(_pairs(settings)).items()]


def former_settings(settings: Iterable[str]) -> list[str]:
    """The same settings under their former names, where they had others."""
    old_keys = {new: old for old, new in CONFIG_KEYS.items()}
    old_attributes = {new: old for old, new in ATTRIBUTES.items()}
    pairs = _pairs(settings)
    if "model.overrides" in pairs:
        pairs["model.overrides"] = overrides(
            pairs["model.overrides"], lambda name: old_attributes.get(name, name)
        )
    return [f"{old_keys.get(key, key)}={value}" for key, value in pairs.items()]


def _pairs(settings: Iterable[str]) -> dict[str, str]:
    return {key: value for key, _, value in (setting.partition("=") for setting in settings)}


def overrides(text: str, rename: Callable[[str], str]) -> str:
    """A config's `model.overrides`, 'squeeze=16 stem=deep', each attribute renamed."""
    words = (word.partition("=") for word in text.split())
    return " ".join(rename(name) + equals + value for name, equals, value in words)


def module(old: str, new: str, **names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that was renamed.

    Args:
      old: its former name.
      new: its current name, which is imported.
      **names: those of its contents that were renamed as well.
    """

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        current(old, {old: new}, "module")
        return getattr(importlib.import_module(new), names.get(name, name))

    return find


def arguments(**names: str) -> Callable[[Function], Function]:
    """A decorator: keywords under former names are accepted, with a warning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*positional: Any, **given: Any) -> Any:
            return function(*positional, **keywords(given, names, "argument"))

        return call  # type: ignore[return-value]

    return decorate

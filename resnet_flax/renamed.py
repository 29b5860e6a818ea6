"""Names of before, and those of now: what users have written is still read.

Config keys and attributes of networks were renamed on 2026-11-28. Where a person gives an old name,
a `RenamedWarning` says the new one; in files that this package has written it is taken silently.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from resnet_flax.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

CONFIG_KEYS = {
    "model.norm_span": "model.bn_group_size",
    "data.colour": "data.pca_lighting",
}
# Attributes of `ResNet`, as `create_model` and a config's `model.axes` take them.
ATTRIBUTES = {
    "norm_groups": "ghost_batches",
    "squeeze": "se_ratio",
    "squeeze_multiple": "se_divisor",
    "group_width": "width_per_group",
    "shortcut_pool": "avg_down",
}


class RenamedWarning(FutureWarning):
    """A name was used that is another now."""


def current(name: str, names: Mapping[str, str], what: str) -> str:
    """The name of now, with a warning where it is another.

    Args:
      name: as the user wrote it.
      names: of before and now.
      what: is named, for the warning: 'config key'.
    """
    if name not in names:
        return name
    new = names[name]
    warnings.warn(f"the {what} {name} is called {new} now; use that", RenamedWarning, stacklevel=3)
    return new


def attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a network as a file of ours holds them, under the names of now."""
    return {ATTRIBUTES.get(name, name): value for name, value in values.items()}


def saved_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A config with dotted keys as a file of ours holds it, under the names of now."""
    config = {CONFIG_KEYS.get(key, key): value for key, value in flat.items()}
    if "model.axes" in config:
        config["model.axes"] = axes(config["model.axes"], lambda name: ATTRIBUTES.get(name, name))
    return config


def axes(text: str, rename: Callable[[str], str]) -> str:
    """A config's `model.axes`, 'squeeze=16 stem=deep', each attribute renamed."""
    words = (word.partition("=") for word in text.split())
    return " ".join(rename(name) + equals + value for name, equals, value in words)


def arguments(**names: str) -> Callable[[Function], Function]:
    """A decorator: keywords of before are taken for those of now, with a warning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*positional: Any, **keywords: Any) -> Any:
            for old in names.keys() & keywords.keys():
                new = current(old, names, "argument")
                if new in keywords:
                    raise UserError(f"{old} and {new} are the same argument; give {new} alone")
                keywords[new] = keywords.pop(old)
            return function(*positional, **keywords)

        return call  # type: ignore[return-value]

    return decorate

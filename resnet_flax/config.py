"""Experiments: read from files and the command line, and checked.

A config file's `get_config()` starts from `default_config()` and fills in what differs; `check`
checks whatever it returns, once, and completes it. It imports none of the families that a config
chooses from (optimizers, losses, data sources): their tables are passed in, see `keys.Tables`.
"""

import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_collections

from resnet_flax import keys, renamed
from resnet_flax.combinations import check_combinations
from resnet_flax.errors import UserError, closest
from resnet_flax.keys import Key, Tables, Value
from resnet_flax.runtime import storage
from resnet_flax.runtime.imports import importing_from
from resnet_flax.schema import SCHEMA, all_keys
from resnet_flax.unknown_keys import unknown_key

NO_TABLES = Tables()


def default_config(known: Mapping[str, Key] = SCHEMA) -> ml_collections.ConfigDict:
    """The default of every key.

    Any key can be assigned: `check` finds those that there are not.

    Args:
      known: the keys; by default those that every experiment has.
    """
    return _nest({key: entry.default for key, entry in known.items()}).unlock()


class _Group(ml_collections.ConfigDict):  # type: ignore[misc]
    """The keys of one group, which can be used by their former names too."""

    _OLD: ClassVar = {old.rpartition(".")[2]: old for old in renamed.CONFIG_KEYS}

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._current(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(self._current(key), value)

    def _current(self, key: str) -> str:
        return _current_key(self._OLD[key]).rpartition(".")[2] if key in self._OLD else key


def _nest(flat: dict[str, Value]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for key, value in flat.items():
        _set(config, key, value)
    return config


def _set(config: ml_collections.ConfigDict, key: str, value: Value) -> None:
    """Sets a dotted key, creating missing groups."""
    *groups, leaf = key.split(".")
    node = config
    for group in groups:
        if group not in node:
            node[group] = _Group()
        node = node[group]
    node[leaf] = value


def flatten(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values; lists, which JSON makes of tuples, become tuples again."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            key = str(key)
            if isinstance(value, dict | ml_collections.ConfigDict) and len(value):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = tuple(value) if isinstance(value, list) else value

    walk(config, "")
    return flat


def check(
    config: ml_collections.ConfigDict | Mapping[str, Any], tables: Tables = NO_TABLES
) -> ml_collections.ConfigDict:
    """The complete config: the defaults, updated with `config`, and checked.

    Args:
      config: any subset of the keys, nested or flat as in checkpoints; old names (`renamed`) are
        read, with a warning.
      tables: what values choose from.

    Returns:
      A locked config that has every key.

    Raises:
      UserError: a key is unknown (the error names the nearest known one), or a value is of the
        wrong type, out of range, in no table, or incompatible with another.
    """
    known = all_keys(tables)
    flat: dict[str, Any] = {key: entry.default for key, entry in known.items()}
    given = renamed.keywords(flatten(config), renamed.CONFIG_KEYS, "config key")
    for key, value in given.items():
        if key not in known:
            raise unknown_key(key, known)
        flat[key] = keys.checked(f"config key {key}", known[key], value)
    flat["model.overrides"] = renamed.overrides(flat["model.overrides"], _current_attribute)
    _check_overrides(flat["model.overrides"], tables.attributes)
    for key, names in tables.lists.items():
        for word in flat[key].split():
            keys.chosen(f"config key {key}", names, word)
    check_combinations(flat)
    for key, table in tables.choices.items():
        entry = keys.chosen(f"config key {key}", table, flat[key])
        entry.check(flat)
        flat |= {name: value for name, value in entry.automatic.items() if flat[name] == "auto"}
    return _nest(flat).lock()


def _check_overrides(text: str, attributes: Mapping[str, Key]) -> None:
    """Checks `model.overrides` as keys are."""
    for name, value in keys.words(text):
        if not attributes:
            continue
        if name not in attributes:
            raise UserError(
                f"model.overrides cannot set {name}{closest(name, attributes)} (it can set "
                f"{', '.join(attributes)})"
            )
        key = attributes[name]
        keys.checked(f"{name} in model.overrides", key, keys.parsed(value, type(key.default)))


def _current_key(key: str) -> str:
    return renamed.current(key, renamed.CONFIG_KEYS, "config key")


def _current_attribute(name: str) -> str:
    return renamed.current(name, renamed.ATTRIBUTES, "attribute of networks")


def override(
    config: ml_collections.ConfigDict, settings: Iterable[str], known: Mapping[str, Key] = SCHEMA
) -> None:
    """Changes `config` in place by settings written 'key=value', as on the command line.

    Args:
      config: to change.
      settings: such as 'optim.learning_rate=0.05'.
      known: all keys.

    Raises:
      UserError: there is no such key, or a setting has no value that the key takes.
    """
    _take_current_keys(config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = _current_key(key)
        if key not in known:
            raise unknown_key(key, known)
        if not equals:
            raise UserError(f"config key {key} needs a value: --config.{key}=VALUE")
        value = keys.parsed(text, type(known[key].default))
        value = keys.checked(f"config key {key}", known[key], value)
        with config.unlocked():
            _set(config, key, value)


def _take_current_keys(config: ml_collections.ConfigDict) -> None:
    """Renames former keys of a config that `default_config` did not make."""
    for old in renamed.CONFIG_KEYS:
        group, _, leaf = old.partition(".")
        if leaf in config.get(group, ()):
            with config.unlocked():
                value = config[group][leaf]
                del config[group][leaf]
                _set(config, _current_key(old), value)


def conflicts(
    config: ml_collections.ConfigDict,
    saved: dict[str, Any],
    known: Mapping[str, Key],
    besides: tuple[str, ...] = (),
) -> dict[str, tuple]:
    """Keys that must equal those of a saved config but differ: `{key: (saved, now)}`.

    A key that the saved config lacks, because it was written before the key existed, counts as its
    `former` value, or else its default.

    Args:
      config: checked.
      saved: of a checkpoint.
      known: all keys, see `all_keys`.
      besides: keys that may differ.
    """
    now, then = flatten(config), renamed.saved_config(flatten(saved))
    before = {
        key: then.get(key, entry.default if entry.former is None else entry.former)
        for key, entry in known.items()
    }
    return {
        key: (before[key], now[key])
        for key, entry in known.items()
        if not entry.resume_safe and key not in besides and before[key] != now[key]
    }


def load_config(path: str) -> ml_collections.ConfigDict:
    """Calls `get_config` of a config file, given as FILE.py or FILE.py:variant.

    A relative path that does not exist is looked up in the configs that come with the package, with
    or without the leading 'configs/'.
    """
    name, variant = _split(path)
    file = _find(str(storage.local(name)))
    spec = importlib.util.spec_from_file_location(f"resnet_flax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file {name} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with importing_from(file.parent.absolute()):
            spec.loader.exec_module(module)
            config = _call(module, name, variant)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the config file {path} cannot be used: {said}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config() of {name} must return an ml_collections.ConfigDict")
    return config


def _call(module: Any, name: str, variant: str) -> Any:
    """What `get_config` of a config file returns."""
    if not hasattr(module, "get_config"):
        raise UserError(f"{name} defines no get_config(), which returns the config")
    if variant and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{name} has no variants; leave ':{variant}' out")
    return module.get_config(variant) if variant else module.get_config()


def _split(path: str) -> tuple[str, str]:
    """The file and the variant of 'FILE.py:VARIANT'; directories may have colons too."""
    name, ending, variant = path.partition(".py:")
    if ending:
        return f"{name}.py", variant
    if path.endswith(".py") or path.startswith("file:"):
        return path, ""
    name, _, variant = path.partition(":")
    return name, variant


def config_name(path: str) -> str:
    """A directory name: 'cifar10_resnet20' for 'configs/cifar10.py:resnet20'."""
    name, variant = _split(path)
    stem = name.rpartition("/")[2].removesuffix(".py")
    return f"{stem}_{variant}" if variant else stem


def _find(name: str) -> Path:
    here = Path(__file__).parent
    shipped = name.removeprefix("configs/")
    # Next to the package in a checkout, inside it when installed.
    for file in (Path(name), here / "configs" / shipped, here.parent / "configs" / shipped):
        if file.is_file():
            return file
    if Path(name).is_dir():
        raise UserError(
            f"{name} is a directory, not a config file; a run continues by its config file and the "
            "directory as --workdir"
        )
    known = sorted(
        f"configs/{file.name}"
        for folder in (here / "configs", here.parent / "configs")
        for file in folder.glob("*.py")
    )
    raise UserError(
        f"there is no config file {name}{closest(name, known)} (known: {', '.join(known)})"
    )

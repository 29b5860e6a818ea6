"""Experiments: read from files and the command line, checked against the schema.

A config file's `get_config()` starts from `default_config()` and fills in what differs;
`resolve` checks whatever it returns.
"""

import ast
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_collections

from resnet_flax import renamed
from resnet_flax.combinations import check_combinations
from resnet_flax.errors import UserError, closest
from resnet_flax.schema import EXPECTED, SCHEMA, Value, unknown_key


def default_config() -> ml_collections.ConfigDict:
    """The schema's defaults; assigning an unknown key raises, a former one (`renamed`) warns."""
    return _nest({key: entry.default for key, entry in SCHEMA.items()})


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
    return config.lock()


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


def resolve(
    config: ml_collections.ConfigDict | Mapping[str, Any],
) -> ml_collections.ConfigDict:
    """The complete config: the schema's defaults, updated with `config` and checked.

    Args:
      config: any subset of the schema's keys, nested or flat as in checkpoints; old names
        (`renamed`) are read, with a warning.

    Returns:
      A locked config that has every key of the schema.

    Raises:
      UserError: a key is unknown (the error names the nearest known one), or a value is of the
        wrong type, out of range, or incompatible with another.
    """
    flat = {key: entry.default for key, entry in SCHEMA.items()}
    given = renamed.keywords(flatten(config), renamed.CONFIG_KEYS, "config key")
    for key, value in given.items():
        if key not in SCHEMA:
            raise unknown_key(key)
        flat[key] = _checked(key, value)
    flat["model.overrides"] = renamed.overrides(str(flat["model.overrides"]), _current_attribute)
    check_combinations(flat)
    return _nest(flat)


def _current_key(key: str) -> str:
    return renamed.current(key, renamed.CONFIG_KEYS, "config key")


def _current_attribute(name: str) -> str:
    return renamed.current(name, renamed.ATTRIBUTES, "attribute of networks")


def override(config: ml_collections.ConfigDict, settings: Iterable[str]) -> None:
    """Changes `config` in place by settings written 'key=value', as on the command line."""
    _take_current_keys(config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = _current_key(key)
        if key not in SCHEMA:
            raise unknown_key(key)
        if not equals:
            raise UserError(f"config key {key} needs a value: --config.{key}=VALUE")
        value = _checked(key, _parsed(text, type(SCHEMA[key].default)))
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


def _parsed(text: str, kind: type) -> Any:
    """`text` as a value of `kind`; unchanged if it is not one, which `_checked` rejects."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if kind is tuple:
        value = tuple(value) if isinstance(value, tuple | list) else (value,)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3
    return value


def _checked(key: str, value: Any) -> Value:
    entry = SCHEMA[key]
    kind = type(entry.default)
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if isinstance(value, tuple | list):
        value = tuple(value)
    numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
    is_number = [isinstance(n, int | float) and not isinstance(n, bool) for n in numbers]
    huge = kind is float and type(value) is int
    if not huge and (type(value) is not kind or (kind is tuple and not all(is_number))):
        raise UserError(f"config key {key} must be {EXPECTED[kind]}, not {value!r}")
    if any(isinstance(n, int | float) and not abs(n) < 1e300 for n in numbers):
        raise UserError(f"config key {key} takes finite numbers, not {value!r}")
    if entry.rule is not None:
        valid, expected = entry.rule
        if not valid(value):
            raise UserError(f"config key {key} must be {expected}, not {value!r}")
    return value


def conflicts(
    config: ml_collections.ConfigDict, saved: dict[str, Any], besides: tuple[str, ...] = ()
) -> dict[str, tuple]:
    """Keys that must equal those of a saved config but differ: `{key: (saved, now)}`.

    Keys in `besides` may differ. A key that the saved config lacks, because it was written before
    the key existed, counts as its default.
    """
    now, then = flatten(config), renamed.saved_config(flatten(saved))
    return {
        key: (then.get(key, entry.default), now[key])
        for key, entry in SCHEMA.items()
        if not entry.resume_safe and key not in besides and then.get(key, entry.default) != now[key]
    }


def load_config(path: str) -> ml_collections.ConfigDict:
    """Calls `get_config` of a config file, given as FILE.py or FILE.py:variant.

    A relative path that does not exist is looked up in the configs that come with the package, with
    or without the leading 'configs/'.
    """
    name, _, variant = path.partition(":")
    file = _find(name)
    spec = importlib.util.spec_from_file_location(f"resnet_flax_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file {name} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
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


def config_name(path: str) -> str:
    """A directory name: 'cifar10_resnet20' for 'configs/cifar10.py:resnet20'."""
    name, _, variant = path.partition(":")
    stem = name.rpartition("/")[2].removesuffix(".py")
    return f"{stem}_{variant}" if variant else stem


def _find(name: str) -> Path:
    here = Path(__file__).parent
    shipped = name.removeprefix("configs/")
    # Next to the package in a checkout, inside it when installed.
    for file in (Path(name), here / "configs" / shipped, here.parent / "configs" / shipped):
        if file.is_file():
            return file
    known = sorted(
        f"configs/{file.name}"
        for folder in (here / "configs", here.parent / "configs")
        for file in folder.glob("*.py")
    )
    raise UserError(
        f"there is no config file {name}{closest(name, known)} (known: {', '.join(known)})"
    )

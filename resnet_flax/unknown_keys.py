"""What is said of a config key that there is not: the key that was meant."""

from collections.abc import Iterable, Mapping

from resnet_flax.errors import UserError, closest
from resnet_flax.keys import Key

# What people call some keys.
_ABBREVIATIONS = {
    "lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "bs": "batch_size",
    "epochs": "steps",
    "model": "model.name",
    "arch": "model.name",
    "weights": "init",
    "data": "data.source",
    "dataset": "data.source",
    "split": "data.eval_split",
}


def keys_called(name: str, keys: Iterable[str]) -> list[str]:
    """The keys that are exactly of this name, with or without their group, or abbreviated so.

    Args:
      name: what a user wrote.
      keys: all keys.
    """
    last = name.rpartition(".")[2]
    found = [key for key in keys if key == name or key.endswith(f".{name}")]
    meant = [_ABBREVIATIONS[word] for word in (last,) if word in _ABBREVIATIONS]
    return [*meant, *found] if name in _ABBREVIATIONS else found or meant


def unknown_key(key: str, keys: Mapping[str, Key]) -> UserError:
    """The error for a config key that is not among `keys`."""
    called = keys_called(key, keys)
    near = f"; did you mean {' or '.join(called)}?" if called else closest(key, keys)
    return UserError(
        f"there is no config key {key!r}{near or '; see resnet-flax train --help for all keys'}"
    )

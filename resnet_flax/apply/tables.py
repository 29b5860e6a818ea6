"""What a config can choose from: the tables of all families together.

To add to a family, add an entry to its table (`OPTIMIZERS`, `SCHEDULES`, `LOSSES`, `METRICS`,
`NORMS`, `BLOCKS`, `SOURCES`) before the config is checked, for example in the config file.
docs/architecture.md has an example of each.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from resnet_flax.data.sources import SOURCES
from resnet_flax.keys import Entry, Key, Tables
from resnet_flax.schema import all_keys
from resnet_flax.training.losses import LOSSES
from resnet_flax.training.optimizer import OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:  # help pages list the keys, without waiting for this import
    import ml_collections

_CHOICES: Mapping[str, Mapping[str, Entry]] = {
    "data.source": SOURCES,
    "optim.optimizer": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "optim.loss": LOSSES,
}


def tables() -> Tables:
    """All tables."""
    from resnet_flax.evaluation.metrics import METRICS
    from resnet_flax.models.attributes import DECIDED, attributes

    settable = {name: key for name, key in attributes().items() if name not in DECIDED}
    return Tables(_CHOICES, {"eval.metrics": METRICS}, settable)


def keys() -> dict[str, Key]:
    """All config keys, in the order of help pages."""
    return all_keys(Tables(_CHOICES))


def default_config() -> "ml_collections.ConfigDict":
    """The default of every config key; `resnet-flax train --help` explains them."""
    from resnet_flax import config as configs

    return configs.default_config(keys())


def override(config: "ml_collections.ConfigDict", settings: Iterable[str]) -> None:
    """Changes a config by settings written 'key=value'; see `config.override`."""
    from resnet_flax import config as configs

    configs.override(config, settings, keys())


def check(config: "ml_collections.ConfigDict") -> "ml_collections.ConfigDict":
    """The complete config, checked; see `config.check`. The only check of an experiment."""
    from resnet_flax import config as configs
    from resnet_flax.models import configured_model

    checked = configs.check(config, tables())
    configured_model(checked.model, num_classes=10)  # raises UserError if it is no network
    return checked

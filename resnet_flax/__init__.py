"""Residual networks in JAX: models, sharded training, exact evaluation."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# What is public. Each name is imported at its first use: `resnet-flax --help` needs none of them,
# and importing JAX takes a second. The imports below tell type checkers the same.
_PUBLIC = {
    "VARIANTS": "resnet_flax.models",
    "ResNet": "resnet_flax.models",
    "UserError": "resnet_flax.errors",
    "create_model": "resnet_flax.models",
    "default_config": "resnet_flax.apply.tables",
    "load": "resnet_flax.weights.loading",
    "load_pretrained": "resnet_flax.weights.loading",
    "parse_overrides": "resnet_flax.models",
    "train": "resnet_flax.apply.experiment",
}

if TYPE_CHECKING:
    from resnet_flax import data
    from resnet_flax.apply.experiment import train
    from resnet_flax.apply.tables import default_config
    from resnet_flax.errors import UserError
    from resnet_flax.models import VARIANTS, ResNet, create_model, parse_overrides
    from resnet_flax.weights.loading import load, load_pretrained

__all__ = [
    "VARIANTS",
    "ResNet",
    "UserError",
    "create_model",
    "data",
    "default_config",
    "load",
    "load_pretrained",
    "parse_overrides",
    "train",
]


if not TYPE_CHECKING:  # for which any name would have a value

    def __getattr__(name: str) -> Any:
        if name == "data":
            return importlib.import_module("resnet_flax.data")
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'resnet_flax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

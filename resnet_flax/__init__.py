"""Residual networks in JAX: models, sharded training, exact evaluation."""

import importlib
from typing import Any

# Imported at first use: `resnet-flax --help` needs none of them, and importing JAX takes a second.
_PUBLIC = {
    "VARIANTS": "resnet_flax.models",
    "ResNet": "resnet_flax.models",
    "UserError": "resnet_flax.errors",
    "create_model": "resnet_flax.models",
    "parse_overrides": "resnet_flax.models",
    "default_config": "resnet_flax.config",
    "load": "resnet_flax.weights.loading",
    "load_pretrained": "resnet_flax.weights.loading",
    "train": "resnet_flax.training.loop",
}

__all__ = [*_PUBLIC, "data"]


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("resnet_flax.data")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'resnet_flax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

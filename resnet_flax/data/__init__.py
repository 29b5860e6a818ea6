"""From data sets to batches on devices.

In a notebook: `for batch in resnet_flax.data.batches("tfds:cifar10", "test"): ...`.
"""

import importlib
from typing import Any

_PUBLIC = {
    "ArraySource": "resnet_flax.data.sources",
    "Batches": "resnet_flax.data.notebook",
    "batches": "resnet_flax.data.notebook",
    "grid": "resnet_flax.data.notebook",
    "open_source": "resnet_flax.data.sources",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'resnet_flax.data' has no attribute {name!r}")

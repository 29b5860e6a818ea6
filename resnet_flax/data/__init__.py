"""From data sets to batches on devices.

In a notebook: `for batch in resnet_flax.data.batches("tfds:cifar10", "test"): ...`.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "ArraySource": "resnet_flax.data.sources",
    "Batches": "resnet_flax.data.notebook",
    "batches": "resnet_flax.data.notebook",
    "grid": "resnet_flax.data.notebook",
    "open_source": "resnet_flax.data.sources",
}

__all__ = ["ArraySource", "Batches", "batches", "grid", "open_source"]

if TYPE_CHECKING:  # see resnet_flax/__init__.py
    from resnet_flax.data.notebook import Batches, batches, grid
    from resnet_flax.data.sources import ArraySource, open_source
else:

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'resnet_flax.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Networks: plain linen modules that need nothing else of the package."""

import importlib
from typing import TYPE_CHECKING, Any

# Each name is imported at its first use, as in `resnet_flax`: the table of variants needs no JAX.
_PUBLIC = {
    "VARIANTS": "resnet_flax.models.variants",
    "ResNet": "resnet_flax.models.resnet",
    "configured_model": "resnet_flax.models.registry",
    "create_model": "resnet_flax.models.registry",
    "parse_overrides": "resnet_flax.models.registry",
}

if TYPE_CHECKING:
    from resnet_flax.models.registry import configured_model, create_model, parse_overrides
    from resnet_flax.models.resnet import ResNet
    from resnet_flax.models.variants import VARIANTS

__all__ = ["VARIANTS", "ResNet", "configured_model", "create_model", "parse_overrides"]


if not TYPE_CHECKING:  # see resnet_flax/__init__.py

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'resnet_flax.models' has no attribute {name!r}")

"""Networks: plain linen modules that need nothing else of the package."""

from resnet_flax.models.registry import VARIANTS, configured_model, create_model, parse_overrides
from resnet_flax.models.resnet import ResNet

__all__ = ["VARIANTS", "ResNet", "configured_model", "create_model", "parse_overrides"]

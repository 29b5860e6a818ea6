"""The former name of `weights.catalog`, for code that was written before 2026-11-28."""

from resnet_flax import renamed

__getattr__ = renamed.module(__name__, "resnet_flax.weights.catalog", PUBLISHED="CATALOG")

"""The attributes of networks: types and ranges, and which values make a network together."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.errors import FlaxError

from resnet_flax import keys
from resnet_flax.errors import UserError, first_line
from resnet_flax.keys import Key
from resnet_flax.models.blocks import BLOCKS, SHORTCUTS, ResidualBlock
from resnet_flax.models.layers import NORMS
from resnet_flax.models.resnet import ResNet

_FROM_1 = (lambda value: value >= 1, "a whole number from 1")
_FROM_0 = (lambda value: value >= 0, "a whole number from 0")
_PER_STAGE = (
    lambda value: len(value) > 0 and all(type(n) is int and n > 0 for n in value),
    "whole numbers from 1, one per stage, separated by commas",
)
_RULES = {
    "stage_sizes": _PER_STAGE,
    "stage_features": _PER_STAGE,
    "num_classes": _FROM_0,
    "remat": _FROM_0,
    "se_ratio": _FROM_0,
    "norm_momentum": keys.FRACTION,
    "shortcut": keys.one_of(*SHORTCUTS),
    "stride_on": keys.one_of("1x1", "3x3"),
    "stem": keys.one_of("cifar", "imagenet", "deep"),
    "stem_pool": keys.one_of("padded", "ceil"),
    "implementation": keys.one_of("auto", "xla"),
    "output_stride": (lambda value: value in (8, 16, 32), "one of 8, 16, 32"),
}
# Attributes that model.overrides cannot set: other config keys or the data decide them.
DECIDED = ("num_classes", "ghost_batches", "norm_momentum", "dtype", "param_dtype", "scan", "remat")


def attributes() -> dict[str, Key]:
    """The attributes of `ResNet` as keys, besides `dtype` and `param_dtype`, which are types.

    Called when they are needed: BLOCKS and NORMS may have got entries.
    """
    for entry in BLOCKS:
        if not (isinstance(entry, tuple) and len(entry) == 2 and type(entry[1]) is bool):
            raise UserError(
                f"BLOCKS has the entry {entry!r}; a block is named by its `block` and its "
                f"`preactivation`, such as BLOCKS['one', False]"
            )
    choices = {
        "block": keys.one_of(*dict.fromkeys(name for name, _ in BLOCKS)),
        "norm": keys.one_of(*NORMS),
    }
    found = {}
    for field in dataclasses.fields(ResNet):
        if field.name in ("parent", "name") or field.name.endswith("dtype"):
            continue
        default: Any = () if field.default is dataclasses.MISSING else field.default
        rule = choices.get(field.name) or _RULES.get(field.name)
        if rule is None and type(default) is int:
            rule = _FROM_1
        found[field.name] = Key(default, "See resnet_flax.ResNet.", rule)
    return found


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes by name in their types.

    Raises:
      UserError: a value does not fit.
    """
    known = attributes()
    return {
        name: check_dtype(name, value)
        if name.endswith("dtype")
        else keys.checked(name, known[name], _plain(value))
        for name, value in values.items()
    }


def _plain(value: Any) -> Any:
    """Python's numbers in place of NumPy's."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value


def check_dtype(name: str, value: Any) -> Any:
    """A floating-point type; raises UserError if it is none."""
    try:
        fits = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise UserError(
            f"{name} must be a floating-point type such as float32 or bfloat16, not {value!r}"
        )
    return jnp.dtype(value)


def check_network(model: ResNet) -> None:
    """Raises UserError for attributes that are not a valid network."""
    if not 0 < len(model.stage_sizes) == len(model.stage_features):
        raise UserError(
            f"stage_sizes={model.stage_sizes} and stage_features={model.stage_features} must "
            "have the same number of entries, one per stage"
        )
    block = BLOCKS.get((model.block, model.preactivation))
    if block is None:
        form = "pre-activation" if model.preactivation else "form without preactivation"
        raise UserError(
            f"block={model.block!r} has no {form}; give preactivation={not model.preactivation}, "
            "or add one to resnet_flax.models.blocks.BLOCKS"
        )
    _check_block(block, model.block)
    _check_norm(model)
    widths = [model.stem_features, *(block.expansion * width for width in model.stage_features)]
    if model.shortcut == "A" and widths != sorted(widths):
        raise UserError(
            f"shortcut='A' only adds channels; stem_features={model.stem_features} and "
            f"stage_features={model.stage_features} must not decrease"
        )
    if not block.grouped and (model.groups, model.width_per_group) != (1, 64):
        raise UserError("groups and width_per_group need block='bottleneck'")
    if model.width_per_group * min(model.stage_features) < 64:
        raise UserError(
            f"groups={model.groups} of width_per_group={model.width_per_group} have no channels"
        )
    _check_stem(model)
    _check_shortcut(model)


def _check_block(block: Any, name: str) -> None:
    """Raises UserError if an entry of BLOCKS, which may be a user's own, is no block."""
    derived = isinstance(block, type) and issubclass(block, ResidualBlock)
    if not derived or not any("__call__" in vars(base) for base in block.__mro__):
        raise UserError(
            f"the block {name!r} is {block!r}; it must be a class that is derived from "
            "resnet_flax.models.blocks.ResidualBlock and has __call__(self, x, train)"
        )


def _check_norm(model: ResNet) -> None:
    """Raises UserError if an entry of NORMS, which may be a user's own, makes no normalization."""
    try:
        make = NORMS[model.norm](model)
        types = {"dtype": model.dtype, "param_dtype": model.param_dtype}
        made = make(**types, scale_init=nn.initializers.ones, name="norm", parent=None)
        inspect.signature(made.__call__).bind(None, True, activate=False, residual=None)
    except (TypeError, AttributeError, FlaxError) as error:
        raise UserError(
            f"the normalization {model.norm!r} does not fit ({first_line(error)}); "
            "its entry in NORMS must be a function of the network, which returns a linen module "
            "class with dtype, param_dtype and scale_init, called with (x, train, activate=False, "
            "residual=None)"
        ) from error


def _check_stem(model: ResNet) -> None:
    if model.stem == "deep" and model.stem_features % 2:
        raise UserError(f"stem='deep' needs an even stem_features, not {model.stem_features}")
    if model.stem == "cifar" and model.stem_pool != "padded":
        raise UserError("stem_pool needs a stem that pools: stem='imagenet' or 'deep'")


def _check_shortcut(model: ResNet) -> None:
    if model.zero_init and model.shortcut == "none":
        raise UserError("zero_init needs a shortcut; without one, blocks would output zeros")
    if model.preactivation and model.zero_init:
        raise UserError("zero_init needs blocks that end in a normalisation, not preactivation")
    if model.preactivation and model.shortcut == "none":
        raise UserError("preactivation needs a shortcut, not shortcut='none'")
    if model.avg_down and model.shortcut not in ("B", "C"):
        raise UserError("avg_down needs projections: shortcut 'B' or 'C'")
    if model.se_ratio and model.shortcut == "none":
        raise UserError("se_ratio needs a shortcut, not shortcut='none'")

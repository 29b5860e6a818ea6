"""The named networks, as arguments of `ResNet`."""

import ast
import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from resnet_flax import renamed
from resnet_flax.errors import UserError, closest
from resnet_flax.models.resnet import CHOICES, ResNet

Overrides = dict[str, Any]

# He et al. 2015, table 1.
SIZES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


def _imagenet(depth: int, **overrides: Any) -> Overrides:
    block, sizes = SIZES[depth]
    return {"block": block, "stage_sizes": sizes, **overrides}


def _cifar(depth: int, **overrides: Any) -> Overrides:
    """Section 4.2: three stages of 16, 32 and 64 channels on a 3x3 stem.

    Two or, for bottlenecks, three layers per block, plus stem and head.
    """
    layers = 9 if overrides.get("block") == "bottleneck" else 6
    return {
        "stage_sizes": ((depth - 2) // layers,) * 3,
        "stage_features": (16, 32, 64),
        "stem_features": 16,
        "stem": "cifar",
        "num_classes": 10,
        **overrides,
    }


_SE = {"se_ratio": 16}
_NEXT = {"groups": 32, "width_per_group": 4}
_V2 = {"preactivation": True, "stem_norm": False}

VARIANTS: dict[str, Overrides] = {
    # He et al. 2015; the stride in bottlenecks as in torchvision and timm ("v1.5").
    **{f"resnet{d}": _imagenet(d) for d in SIZES},
    # The stride as in the paper.
    **{f"resnet{d}_v1": _imagenet(d, stride_on="1x1") for d in (50, 101, 152)},
    **{
        f"resnet{d}_{option.lower()}": _imagenet(d, shortcut=option)
        for d in (18, 34)
        for option in "ABC"
    },
    **{f"plain{d}": _imagenet(d, shortcut="none") for d in (18, 34)},
    # He et al. 2016, "Identity Mappings in Deep Residual Networks"; the stem as in timm.
    **{f"resnetv2_{d}": _imagenet(d, **_V2) for d in SIZES},
    # Xie et al. 2017.
    "resnext50_32x4d": _imagenet(50, **_NEXT),
    "resnext101_32x4d": _imagenet(101, **_NEXT),
    "resnext101_32x8d": _imagenet(101, groups=32, width_per_group=8),
    "resnext101_64x4d": _imagenet(101, groups=64, width_per_group=4),
    # Zagoruyko and Komodakis 2016.
    **{f"wide_resnet{d}_2": _imagenet(d, width_per_group=128) for d in (50, 101)},
    # Hu et al. 2018.
    **{f"seresnet{d}": _imagenet(d, **_SE) for d in SIZES},
    **{f"seresnext{d}_32x4d": _imagenet(d, **_NEXT, **_SE) for d in (50, 101)},
    # He et al. 2018, "Bag of Tricks", ResNet-D with the deep stem.
    **{f"resnet{d}d": _imagenet(d, stem="deep", avg_down=True) for d in SIZES},
    # The depths of table 6, and 8 for quick looks.
    **{f"cifar_resnet{d}": _cifar(d, shortcut="A") for d in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{d}": _cifar(d, shortcut="none") for d in (8, 20, 32, 44, 56, 110)},
    "cifar_resnetv2_110": _cifar(110, **_V2),
    **{
        f"cifar_resnetv2_{d}": _cifar(d, **_V2, block="bottleneck", stride_on="1x1")
        for d in (164, 1001)
    },
    "wrn28_10": _cifar(26, **_V2, stage_features=(160, 320, 640)),
}

# The keywords of create_model and their types.
ATTRIBUTES = {
    f.name: f.type for f in dataclasses.fields(ResNet) if f.name not in ("parent", "name")
}


def create_model(name: str, /, **overrides: Any) -> ResNet:
    """The network called `name`, with any of its attributes changed.

    Args:
      name: a key of `VARIANTS`, such as 'resnet50'.
      **overrides: attributes of `ResNet`, such as `num_classes`, `dtype`, `shortcut`.

    Returns:
      A linen module: `model.init(key, x, train=False)` makes its variables and
      `model.apply(variables, x, train=False)` float32 logits.

    Raises:
      UserError: the name or an attribute is unknown, or the attributes are not a valid network.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise UserError(f"there is no model called {name!r}{closest(str(name), VARIANTS)}")
    overrides = renamed.keywords(overrides, renamed.ATTRIBUTES, "attribute of networks")
    for attribute in overrides:
        if attribute not in ATTRIBUTES:
            near = f"{closest(attribute, ATTRIBUTES)} (known: {', '.join(ATTRIBUTES)})"
            raise UserError(f"{name} has no attribute called {attribute!r}{near}")
    overrides = {key: check_attribute(key, value) for key, value in overrides.items()}
    model = ResNet(**{**VARIANTS[name], **overrides})
    _check(model)
    return model


def configured_model(
    config: ml_collections.ConfigDict, num_classes: int, ghost_batches: int = 1
) -> ResNet:
    """The network that a config's `model` describes.

    Args:
      config: the keys of `model`.
      num_classes: outputs.
      ghost_batches: see `ResNet`; has no effect in evaluation.
    """
    decided = {
        "num_classes": num_classes,
        "ghost_batches": ghost_batches,
        "norm_momentum": config.norm_momentum,
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.float32,
        "scan": config.scan,
        "remat": config.remat,
    }
    overrides = parse_overrides(config.overrides)
    for name in overrides.keys() & decided.keys():
        raise UserError(f"model.overrides cannot set {name}: other keys or the data decide it")
    return create_model(config.name, **overrides, **decided)


def parse_overrides(text: str) -> Overrides:
    """Parses attributes such as 'shortcut=C stem=deep stage_sizes=2,2,2,2'.

    Raises:
      UserError: a word is not of the form `name=value`.
    """
    overrides: Overrides = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name in overrides:
            raise UserError(f"{name} is given twice in model.overrides")
        if not equals:
            raise UserError(
                f"model.overrides are written name=value with spaces between, not {word!r}"
            )
        try:
            overrides[name] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            overrides[name] = value  # a word, such as deep or 3x3
    return overrides


def check_attribute(name: str, value: Any) -> Any:
    """The value in the attribute's type; raises UserError if it does not fit."""
    kind = ATTRIBUTES[name]
    if kind is bool:
        fits, expected = isinstance(value, bool), "True or False"
    elif kind is int:
        least = 0 if name in ("remat", "se_ratio") else 1
        is_number = isinstance(value, int | np.integer) and (name == "remat" or value is not True)
        fits, expected = is_number and least <= value, f"a whole number from {least}"
        value = int(value) if fits else value
    elif kind is float:
        fits, expected = isinstance(value, float) and 0 <= value < 1, "a number from 0 to 1"
    elif kind is str:
        fits, expected = isinstance(value, str), "one of " + ", ".join(map(str, CHOICES[name]))
    elif name.endswith("dtype"):
        fits, expected = _is_float(value), "a floating-point type such as float32 or bfloat16"
        value = jnp.dtype(value) if fits else value
    else:
        numbers = value if isinstance(value, tuple | list) else ()
        fits = len(numbers) > 0 and all(isinstance(n, int | np.integer) and n > 0 for n in numbers)
        expected = "whole numbers from 1, one per stage, separated by commas"
        value = tuple(map(int, numbers)) if fits else value
    if not fits:
        raise UserError(f"{name} takes {expected}, not {value!r}")
    return value


def _is_float(value: Any) -> bool:
    try:
        return value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


def _check(model: ResNet) -> None:
    """Raises UserError for attributes that are not a valid network."""
    for name, choices in CHOICES.items():
        value = getattr(model, name)
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise UserError(f"{name} must be one of {known}, not {value!r}")
    if not 0 < len(model.stage_sizes) == len(model.stage_features):
        raise UserError(
            f"stage_sizes={model.stage_sizes} and stage_features={model.stage_features} must "
            "have the same number of entries, one per stage"
        )
    times = 4 if model.block == "bottleneck" else 1
    widths = [model.stem_features, *(times * width for width in model.stage_features)]
    if model.shortcut == "A" and widths != sorted(widths):
        raise UserError(
            f"shortcut='A' only adds channels; stem_features={model.stem_features} and "
            f"stage_features={model.stage_features} must not decrease"
        )
    if model.block == "basic" and (model.groups, model.width_per_group) != (1, 64):
        raise UserError("groups and width_per_group need block='bottleneck'")
    if model.stem == "deep" and model.stem_features % 2:
        raise UserError(f"stem='deep' needs an even stem_features, not {model.stem_features}")
    if model.stem == "cifar" and model.stem_pool != "padded":
        raise UserError("stem_pool needs a stem that pools: stem='imagenet' or 'deep'")
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
    if model.width_per_group * min(model.stage_features) < 64:
        raise UserError(
            f"groups={model.groups} of width_per_group={model.width_per_group} have no channels"
        )

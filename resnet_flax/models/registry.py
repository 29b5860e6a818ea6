"""Networks by name: `create_model`, and the checks of their attributes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from resnet_flax import renamed
from resnet_flax.errors import UserError, closest
from resnet_flax.keys import parsed, words
from resnet_flax.models.attributes import DECIDED, attributes, check_network, checked
from resnet_flax.models.resnet import ResNet
from resnet_flax.models.variants import VARIANTS, Overrides

# The keywords of create_model.
ATTRIBUTES = tuple(f.name for f in dataclasses.fields(ResNet) if f.name not in ("parent", "name"))


def create_model(name: str, /, **overrides: Any) -> ResNet:
    """The network called `name`, with any of its attributes changed.

    Args:
      name: a key of `VARIANTS`, such as 'resnet50'.
      **overrides: attributes of `ResNet`, such as `num_classes`, `dtype`, `shortcut`.

    Returns:
      A linen module: `model.init(key, x, train=False)` makes its variables and
      `model.apply(variables, x, train=False)` float32 logits, or features with `num_classes=0`.

    Raises:
      UserError: the name or an attribute is unknown, or the attributes are not a valid network.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        near = closest(str(name), VARIANTS) or "; resnet-flax models lists them"
        raise UserError(f"there is no model called {name!r}{near}")
    overrides = renamed.keywords(overrides, renamed.ATTRIBUTES, "attribute of networks")
    for attribute in overrides:
        if attribute not in ATTRIBUTES:
            near = f"{closest(attribute, ATTRIBUTES)} (known: {', '.join(ATTRIBUTES)})"
            raise UserError(f"{name} has no attribute called {attribute!r}{near}")
    model = ResNet(**{**VARIANTS[name], **checked(overrides)})
    check_network(model)
    return model


def changed(model: ResNet, overrides: Mapping[str, Any]) -> ResNet:
    """A network with some attributes changed, as `settable` returns them.

    Raises:
      UserError: the attributes are not a valid network together.
    """
    model = model.clone(**overrides)
    check_network(model)
    return model


def settable(overrides: Mapping[str, Any] | str, where: str = "overrides") -> Overrides:
    """Changes to a network, checked one by one, under the current names of the attributes.

    Args:
      overrides: by attribute, or as `parse_overrides` takes them.
      where: what the error calls them.

    Raises:
      UserError: there is no such attribute, weights or other arguments decide it, or a value is of
        the wrong type or out of range.
    """
    given = parse_overrides(overrides, where) if isinstance(overrides, str) else dict(overrides)
    found = renamed.keywords(given, renamed.ATTRIBUTES, "attribute of networks")
    known = [name for name in ATTRIBUTES if name not in DECIDED]
    for name in found:
        if name in DECIDED:
            raise UserError(
                f"{where} cannot set {name}, which comes with the weights or from another setting"
            )
        if name not in known:
            raise UserError(
                f"{where} cannot set {name!r}{closest(name, known)} (can set {', '.join(known)})"
            )
    return checked(found)


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
    return create_model(config.name, **parse_overrides(config.overrides), **decided)


def parse_overrides(text: str, where: str = "model.overrides") -> Overrides:
    """Parses attributes such as 'shortcut=C stem=deep stage_sizes=2,2,2,2'.

    Values that are not of an attribute's type stay as they are; `create_model` names them.

    Args:
      text: to be parsed.
      where: what errors call it.

    Raises:
      UserError: a word is not of the form `name=value`.
    """
    known = attributes()
    known |= {old: known[new] for old, new in renamed.ATTRIBUTES.items()}
    return {
        name: parsed(value, type(known[name].default)) if name in known else value
        for name, value in words(text, where)
    }

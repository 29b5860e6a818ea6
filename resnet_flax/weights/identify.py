"""Identifies the network of the weights in a file."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resnet_flax.errors import SettingError, UserError
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.models.registry import changed
from resnet_flax.weights.description import Description
from resnet_flax.weights.files import Arrays, WeightsFile
from resnet_flax.weights.fitting import torch_shapes
from resnet_flax.weights.torch_layout import COUNTER

# Attributes that a variant's name fixes; others may be changed under the same name.
_NAMED = (
    *("stage_sizes", "groups", "width_per_group", "stride_on"),
    *("shortcut", "preactivation", "stem"),
)


def identify(
    file: WeightsFile,
    described: Description,
    variant: str,
    origin: str,
    overrides: Mapping[str, Any] = {},
) -> ResNet:
    """The network of a file's weights.

    Args:
      file: of weights.
      described: their description.
      variant: given by the user; if empty, the description and the shapes decide.
      origin: of the file, for errors.
      overrides: attributes given by the user, see `registry.settable`.

    Raises:
      UserError: nothing decides it, or `variant` contradicts the description.
    """
    if described.model is not None:
        if variant:
            _check_variant(variant, described.model, origin, overrides)
        return changed(described.model, overrides)
    if not variant:
        return infer(file.arrays, origin, overrides)
    axes: dict[str, Any] = {"stem_pool": "ceil"} if file.caffe else {}
    if "conv1.bias" in file.arrays:
        axes["stem_bias"] = True
    return create_model(
        variant, num_classes=classes_of(file.arrays, origin), **{**axes, **overrides}
    )


def _check_variant(variant: str, model: ResNet, origin: str, overrides: Mapping[str, Any]) -> None:
    asked = create_model(variant, num_classes=model.num_classes, **overrides)
    if any(getattr(asked, axis) != getattr(model, axis) for axis in _NAMED):
        raise UserError(
            f"{origin} describes itself as a network other than {variant}; leave {variant} out"
        )


def infer(
    arrays: Arrays,
    origin: str,
    overrides: Mapping[str, Any] = {},
) -> ResNet:
    """The network with a file's names and shapes.

    Args:
      arrays: by torch's names.
      origin: of the file, for errors.
      overrides: attributes of that network, see `registry.settable`.

    Raises:
      UserError: there is no such network, or more than one.
    """
    classes = classes_of(arrays, origin)
    given = {name: a.shape for name, a in arrays.items() if not name.endswith(COUNTER)}

    def shapes_of(model: ResNet) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in torch_shapes(model, arrays).items()}

    found: dict[ResNet, str] = {}
    for variant in VARIANTS:
        try:
            model = create_model(variant, num_classes=classes, **overrides)
        except UserError:
            continue  # overrides that this one cannot have
        if model in found or _stage_sizes(given) != model.stage_sizes:
            continue  # another name of the same network, or no need to trace it
        # Most differ in the first block of a stage, which is traced quickly.
        shallow = model.clone(stage_sizes=(1,) * len(model.stage_sizes))
        if shapes_of(shallow).items() <= given.items() and shapes_of(model) == given:
            found[model] = variant
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise SettingError(
            f"the names and shapes in {origin} are not those of a known network; name the network "
            f"to compare it with ({', '.join(list(VARIANTS)[:6])}, ...) as",
            "variant",
        )
    raise SettingError(
        f"{origin} fits {' and '.join(found.values())}, which have the same shapes; give one of "
        "them as",
        "variant",
    )


def classes_of(arrays: Arrays, origin: str) -> int:
    """The number of classes that a file's head is for; 0 if it has no head."""
    for head in ("fc", "linear", "head.fc"):
        kernel, bias = (arrays.get(f"{head}.{leaf}") for leaf in ("weight", "bias"))
        if bias is not None and bias.ndim == 1:
            return len(bias)
        if kernel is not None or bias is not None:
            raise UserError(
                f"the head of {origin}, {head}, has no bias of one number per class; give the "
                "weights of a network whose head is a linear layer with a bias"
            )
    return 0


def _stage_sizes(names: Iterable[str]) -> tuple[int, ...]:
    """The number of blocks of each stage, from the names."""
    blocks: dict[int, int] = {}
    for name in names:
        match = re.match(r"(?:layer|stages\.)(\d+)\.(?:blocks\.)?(\d+)\.", name)
        if match:
            stage, block = map(int, match.groups())
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    return tuple(blocks[stage] for stage in sorted(blocks))

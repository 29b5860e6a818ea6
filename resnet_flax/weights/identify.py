"""Identifies the network of the weights in a file."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resnet_flax.errors import UserError
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.weights.description import Description
from resnet_flax.weights.files import Arrays, WeightsFile
from resnet_flax.weights.fitting import torch_shapes
from resnet_flax.weights.torch_layout import COUNTER

# Attributes that a variant's name fixes; others may be changed under the same name.
_NAMED = (
    *("stage_sizes", "groups", "width_per_group", "stride_on"),
    *("shortcut", "preactivation", "stem"),
)


def identify(file: WeightsFile, described: Description, variant: str, origin: str) -> ResNet:
    """The network of a file's weights.

    Args:
      file: of weights.
      described: their description.
      variant: given by the user; if empty, the description and the shapes decide.
      origin: of the file, for errors.

    Raises:
      UserError: nothing decides it, or `variant` contradicts the description.
    """
    if described.model is not None:
        if variant:
            _check_variant(variant, described.model, origin)
        return described.model
    if not variant:
        return infer(file.arrays, origin, described.function)
    axes: dict[str, Any] = {"stem_pool": "ceil"} if file.caffe else {}
    if "conv1.bias" in file.arrays:
        axes["stem_bias"] = True
    return create_model(variant, num_classes=classes_of(file.arrays, origin), **axes)


def _check_variant(variant: str, model: ResNet, origin: str) -> None:
    asked = create_model(variant, num_classes=model.num_classes)
    if any(getattr(asked, axis) != getattr(model, axis) for axis in _NAMED):
        raise UserError(
            f"{origin} describes itself as a network other than {variant}; leave {variant} out"
        )


def infer(arrays: Arrays, origin: str, function: Mapping[str, Any] = {}) -> ResNet:
    """The network with a file's names and shapes.

    Args:
      arrays: by torch's names.
      origin: of the file, for errors.
      function: attributes that tell networks of the same shapes apart, as far as known.

    Raises:
      UserError: there is no such network, or more than one.
    """
    classes = classes_of(arrays, origin)
    given = {name: a.shape for name, a in arrays.items() if not name.endswith(COUNTER)}

    def shapes_of(model: ResNet) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in torch_shapes(model, arrays).items()}

    found: dict[ResNet, str] = {}
    sizes = _stage_sizes(given)
    for variant in (name for name in VARIANTS if VARIANTS[name]["stage_sizes"] == sizes):
        model = create_model(variant, num_classes=classes)
        if model in found or not _has_stem(model, given):
            continue  # another name of the same network, or no need to trace it
        # Most differ in the stem or the first block, which are traced quickly.
        first = create_model(
            variant, num_classes=0, stage_sizes=(1,), stage_features=model.stage_features[:1]
        )
        begins = {(name, shape) for name, shape in shapes_of(first).items() if "norm." not in name}
        if begins <= given.items() and shapes_of(model) == given:
            found[model] = variant
    told = {model: found[model] for model in found if function.items() <= vars(model).items()}
    found = told or found
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise UserError(
            f"the names and shapes in {origin} are not those of a known network; name the "
            f"network to compare it with as --model ({', '.join(list(VARIANTS)[:6])}, ...)"
        )
    raise UserError(
        f"{origin} fits {' and '.join(found.values())}, which have the same shapes; give one of "
        "them as --model"
    )


def _has_stem(model: ResNet, given: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the first convolution is a network's."""
    deep = model.stem == "deep"
    name = "stem.conv" if model.preactivation else "conv1"
    name += ("1" if model.preactivation else ".0") if deep else ""
    side = 7 if model.stem == "imagenet" else 3
    features, _, *sides = given.get(f"{name}.weight", (0, 0))
    return (features, sides) == (model.stem_features // (1 + deep), [side, side])


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

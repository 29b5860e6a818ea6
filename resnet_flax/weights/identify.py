"""Identifies the network of the weights in a file."""

import re
from typing import Any

from resnet_flax.errors import UserError, listed
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.weights.description import Description
from resnet_flax.weights.files import Arrays, WeightsFile
from resnet_flax.weights.fitting import torch_shapes
from resnet_flax.weights.mismatch import explain, stage_sizes
from resnet_flax.weights.torch_layout import COUNTER

# Attributes that a variant's name fixes; others may be changed under the same name.
_NAMED = (
    *("stage_sizes", "groups", "width_per_group", "stride_on"),
    *("shortcut", "preactivation", "stem"),
)

# What the linear layer of the classes is called.
_HEADS = ("fc", "linear", "head.fc")

# Modules that are no part of the trunk, by the names that training programs give them.
_HEAD_MODULE = re.compile(
    r"(?:fc|mlp|classifier|\w*head\w*|\w*linear\w*|proj\w*|pred\w*|prototypes\w*)(?=\.)"
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
        return infer(file.arrays, origin)
    axes: dict[str, Any] = {"stem_pool": "ceil"} if file.caffe else {}
    if "conv1.bias" in file.arrays:
        axes["stem_bias"] = True
    return create_model(variant, num_classes=head_classes(file.arrays, origin), **axes)


def _check_variant(variant: str, model: ResNet, origin: str) -> None:
    asked = create_model(variant, num_classes=model.num_classes)
    if any(getattr(asked, axis) != getattr(model, axis) for axis in _NAMED):
        raise UserError(
            f"{origin} describes itself as a network other than {variant}; leave {variant} out"
        )


def infer(arrays: Arrays, origin: str) -> ResNet:
    """The network with a file's names and shapes.

    Args:
      arrays: by torch's names.
      origin: of the file, for errors.

    Raises:
      UserError: there is no such network, or more than one.
    """
    classes = head_classes(arrays, origin)
    given = {name: a.shape for name, a in arrays.items() if not name.endswith(COUNTER)}

    def shapes_of(model: ResNet) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in torch_shapes(model, arrays).items()}

    found: dict[ResNet, str] = {}
    common: dict[ResNet, tuple[int, str]] = {}  # how many arrays fit, and the name
    for variant in VARIANTS:
        model = create_model(variant, num_classes=classes)
        if model in common or stage_sizes(given) != model.stage_sizes:
            continue  # another name of the same network, or no need to trace it
        # Most differ in the first block of a stage, which is traced quickly.
        shallow = create_model(
            variant, num_classes=classes, stage_sizes=(1,) * len(model.stage_sizes)
        )
        wanted = shapes_of(shallow).items()
        common[model] = len(wanted & given.items()), variant
        if wanted <= given.items() and shapes_of(model) == given:
            found[model] = variant
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise UserError(
            f"{origin} fits {' and '.join(found.values())}, which have the same shapes; give one "
            "of them as --model"
        )
    sizes = ", ".join(map(str, stage_sizes(given)))
    nearest = f"its stages have {sizes} blocks" if sizes else f"they begin with {listed(given)}"
    if common:
        model = max(common, key=lambda model: common[model][0])
        nearest = f"the nearest is {common[model][1]}: {explain(given, shapes_of(model))}"
    raise UserError(
        f"the names and shapes in {origin} are not those of a known network; {nearest}; name the "
        f"network to compare it with as --model ({', '.join(list(VARIANTS)[:6])}, ...)"
    )


def without_other_heads(file: WeightsFile) -> WeightsFile:
    """Leaves out heads that are not one linear layer, such as projections of contrastive training.

    For a network that gets no head, or a new one.
    """
    other = [
        name
        for name in file.arrays
        if (module := _HEAD_MODULE.match(name)) and not _is_linear(file.arrays, module[0])
    ]
    kept = {name: array for name, array in file.arrays.items() if name not in other}
    return file._replace(arrays=kept, left_out=(*file.left_out, *other))


def _is_linear(arrays: Arrays, module: str) -> bool:
    """Whether the head of this name is a linear layer with a bias, of whatever size."""
    names = [f"{head}.{leaf}" for head in _HEADS for leaf in ("weight", "bias")]
    its = [name for name in arrays if name.startswith(f"{module}.")]
    return bool(its) and all(name in names for name in its) and len(its) == 2


def head_classes(arrays: Arrays, origin: str) -> int:
    """The number of classes that a file's head is for; 0 if it has no head."""
    for head in _HEADS:
        kernel, bias = (arrays.get(f"{head}.{leaf}") for leaf in ("weight", "bias"))
        if bias is not None and bias.ndim == 1:
            return len(bias)
        its = [name for name in arrays if name.startswith(f"{head}.")]
        if kernel is not None or bias is not None or its:
            raise UserError(
                f"the head of {origin}, {head}, has no bias of one number per class (its arrays: "
                f"{listed(its)}); give the weights of a network whose head is a linear layer with "
                "a bias, or load them in Python with num_classes=0, which leaves the head out, or "
                "num_classes=N, reset_head=True, which makes a new one"
            )
    return 0

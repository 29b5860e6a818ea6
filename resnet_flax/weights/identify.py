"""Identifies the network of the weights in a file."""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from resnet_flax.errors import SettingError, UserError, listed
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.models.registry import changed
from resnet_flax.weights.description import Description
from resnet_flax.weights.files import WeightsFile
from resnet_flax.weights.fitting import torch_shapes
from resnet_flax.weights.formats import Arrays
from resnet_flax.weights.mismatch import explain, stage_sizes
from resnet_flax.weights.torch_layout import COUNTER

# Attributes that a variant's name fixes; others may be changed under the same name.
_NAMED = (
    *("stage_sizes", "groups", "width_per_group", "stride_on"),
    *("shortcut", "preactivation", "stem"),
)

Shapes = dict[str, tuple[int, ...]]

# What the linear layer of the classes is called.
_HEADS = ("fc", "linear", "head.fc")

# Modules that are no part of the trunk, by the names that training programs give them.
_HEAD_MODULE = re.compile(
    r"(?:fc|mlp|classifier|\w*head\w*|\w*linear\w*|proj\w*|pred\w*|prototypes\w*)(?=\.)"
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
        return infer(file.arrays, origin, described.function, overrides)
    axes: dict[str, Any] = {"stem_pool": "ceil"} if file.caffe else {}
    if "conv1.bias" in file.arrays:
        axes["stem_bias"] = True
    classes = head_classes(file.arrays, origin)
    return create_model(variant, num_classes=classes, **{**axes, **overrides})


def _check_variant(variant: str, model: ResNet, origin: str, overrides: Mapping[str, Any]) -> None:
    asked = create_model(variant, num_classes=model.num_classes, **overrides)
    if any(getattr(asked, axis) != getattr(model, axis) for axis in _NAMED):
        raise UserError(
            f"{origin} describes itself as a network other than {variant}; leave {variant} out"
        )


def infer(
    arrays: Arrays,
    origin: str,
    function: Mapping[str, Any] = {},
    overrides: Mapping[str, Any] = {},
) -> ResNet:
    """The network with a file's names and shapes.

    Args:
      arrays: by torch's names.
      origin: of the file, for errors.
      function: attributes that tell networks of the same shapes apart, as far as known.
      overrides: attributes of that network, see `registry.settable`.

    Raises:
      UserError: there is no such network, or more than one.
    """
    classes = head_classes(arrays, origin)
    given = {name: a.shape for name, a in arrays.items() if not name.endswith(COUNTER)}

    def shapes_of(model: ResNet) -> Shapes:
        return {name: shape for name, (_, shape) in torch_shapes(model, arrays).items()}

    alike = _of_stages(stage_sizes(given), {"num_classes": classes, **overrides})
    found = {
        model: variant
        for model, variant in alike.items()
        if _begins(model, given, shapes_of) and shapes_of(model) == given
    }
    told = {model: found[model] for model in found if function.items() <= vars(model).items()}
    found = told or found
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise SettingError(
            f"{origin} fits {' and '.join(found.values())}, which have the same shapes; give one "
            "of them as",
            "variant",
        )
    raise SettingError(
        f"the names and shapes in {origin} are not those of a known network; "
        f"{_nearest(alike, given, shapes_of)}; name the network to compare it with "
        f"({', '.join(list(VARIANTS)[:6])}, ...) as",
        "variant",
    )


def _of_stages(sizes: tuple[int, ...], attributes: Mapping[str, Any]) -> dict[ResNet, str]:
    """The networks with as many blocks in each stage, and one of their names."""
    found: dict[ResNet, str] = {}
    for variant, own in VARIANTS.items():
        if attributes.get("stage_sizes", own["stage_sizes"]) == sizes:
            with contextlib.suppress(UserError):  # overrides that this one cannot have
                found.setdefault(create_model(variant, **attributes), variant)
    return found


def _begins(model: ResNet, given: Shapes, shapes_of: Callable[[ResNet], Shapes]) -> bool:
    """Whether stem and first block are a network's: most differ there, and it is traced quickly."""
    deep = model.stem == "deep"
    name = "stem.conv" if model.preactivation else "conv1"
    name += ("1" if model.preactivation else ".0") if deep else ""
    side = 7 if model.stem == "imagenet" else 3
    shape = given.get(f"{name}.weight", ())
    if len(shape) != 4 or (shape[0], *shape[2:]) != (model.stem_features // (1 + deep), side, side):
        return False
    first = model.clone(num_classes=0, stage_sizes=(1,), stage_features=model.stage_features[:1])
    return {i for i in shapes_of(first).items() if "norm." not in i[0]} <= given.items()


def _nearest(
    alike: Mapping[ResNet, str], given: Shapes, shapes_of: Callable[[ResNet], Shapes]
) -> str:
    """What distinguishes a file's arrays from those of the network with most in common."""
    sizes = ", ".join(map(str, stage_sizes(given)))
    if not alike:
        return f"its stages have {sizes} blocks" if sizes else f"they begin with {listed(given)}"

    def in_common(model: ResNet) -> int:
        shallow = model.clone(stage_sizes=(1,) * len(model.stage_sizes))
        return len(shapes_of(shallow).items() & given.items())

    nearest = max(alike, key=in_common)
    return f"the nearest is {alike[nearest]}: {explain(given, shapes_of(nearest))}"


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

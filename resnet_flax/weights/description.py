"""Descriptions of weights, from the catalogue or in a file that this package wrote."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from resnet_flax import renamed
from resnet_flax.data.class_names import unusable
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, first_line
from resnet_flax.models import ResNet, create_model
from resnet_flax.weights.catalog import CATALOG, Published
from resnet_flax.weights.files import WeightsFile
from resnet_flax.weights.torch_layout import layout_of

# Attributes that do not affect which network it is.
_COMPUTATION = (
    *("parent", "name", "dtype", "param_dtype"),
    *("scan", "remat", "ghost_batches", "norm_momentum", "implementation"),
)

# Attributes that affect what a network computes, but not, or not always, the shapes of weights.
_FUNCTION = (
    *("block", "shortcut", "stride_on", "preactivation", "stem", "stem_pool"),
    *("avg_down", "norm"),
)

# Attributes of Caffe's networks of any depth.
_CAFFE = {"stride_on": "1x1", "stem_pool": "ceil"}


class Description(NamedTuple):
    """A description of weights.

    Attributes:
      model: their network; None if unknown.
      preprocessing: of its images; None if unknown.
      class_names: of its outputs; empty if unknown.
      function: the attributes that they need, whatever their shapes.
    """

    model: ResNet | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    function: dict[str, Any] = {}


def describe(file: WeightsFile, published: Published | None, origin: str) -> Description:
    """The description of a file by the catalogue, or by the file itself.

    Args:
      file: of weights.
      published: its entry in the catalogue, if any.
      origin: of the file, for errors.

    Raises:
      UserError: the file's own description is invalid.
    """
    if published:
        model = create_model(
            published.variant, num_classes=published.classes, **dict(published.axes)
        )
        names = published.class_names
        return Description(model, published.preprocessing, names, function_of(model))
    if file.about:
        return _from_json(file.about, origin)
    if file.caffe:
        caffe = CATALOG["resnet50_v1.caffe_in1k"].preprocessing
        return Description(preprocessing=caffe, function=_CAFFE)
    return Description(function=dict(file.function))


def as_published(
    described: Description, published: Published, classes: int, name: str
) -> Description:
    """What a file is taken for that the user calls by the name of published weights.

    What the file says of itself is kept: its class names, its preprocessing, its network.

    Args:
      described: by the file.
      published: what it is called.
      classes: number of classes of the file's head.
      name: of the published weights, for errors.
    """
    if described.model is not None:
        return described
    model = create_model(published.variant, num_classes=classes, **dict(published.axes))
    check_function(described.function, model, name)
    names = published.class_names if published.classes == classes else ()
    preprocessing = described.preprocessing or published.preprocessing
    return Description(model, preprocessing, names, function_of(model))


def function_of(model: ResNet) -> dict[str, Any]:
    """The attributes of a network that affect what it computes, but not always the shapes."""
    return {axis: getattr(model, axis) for axis in _FUNCTION}


def check_function(function: dict[str, Any], model: ResNet, origin: str) -> None:
    """Raises UserError if weights have a network's shapes, but need another function."""
    different = [
        f"{axis}={value!r}, not {getattr(model, axis)!r}"
        for axis, value in function.items()
        if getattr(model, axis) != value
    ]
    if different:
        raise UserError(
            f"{origin} is for a network with {', '.join(different)}; give such a network"
        )


def to_json(
    model: ResNet, preprocessing: Preprocessing | None, class_names: tuple[str, ...], origin: str
) -> dict[str, Any]:
    """The description in an exported file."""
    return {
        "axes": {
            f.name: getattr(model, f.name)
            for f in dataclasses.fields(ResNet)
            if f.name not in _COMPUTATION and getattr(model, f.name) != f.default
        },
        "layout": layout_of(model),
        "preprocessing": preprocessing.to_json() if preprocessing else {},
        "class_names": list(class_names),
        "origin": origin,
    }


def _from_json(about: Any, origin: str) -> Description:
    """The inverse of `to_json`; its input is not trusted."""
    try:
        model = create_model(
            "resnet18", **{**renamed.attributes(about["axes"]), "dtype": jnp.float32}
        )
        preprocessing = about["preprocessing"]
        names = tuple(about["class_names"])
        if not isinstance(preprocessing, dict) or not all(isinstance(n, str) for n in names):
            raise TypeError("values of wrong types")
        if any(map(unusable, names)):
            raise ValueError("names of classes with line breaks or control characters")
        if len(names) not in (0, model.num_classes):
            raise ValueError(f"{len(names)} names for {model.num_classes} classes")
        found = Preprocessing.from_json(preprocessing) if preprocessing else None
        return Description(model, found, names, function_of(model))
    except Exception as error:  # errors of all types
        raise UserError(
            f"{origin} has an invalid description of itself ({first_line(error)}); export it again"
        ) from error

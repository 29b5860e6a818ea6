"""Networks with weights: from wherever these lie, and out again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from resnet_flax import renamed
from resnet_flax.config import resolve
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, closest, first_line
from resnet_flax.models import VARIANTS, ResNet, configured_model, create_model
from resnet_flax.training.checkpoint_files import DamagedError, newest, read_meta, read_variables
from resnet_flax.weights.files import WeightsFile, read_weights, write_weights
from resnet_flax.weights.matching import COUNTER, classes_of, infer, layout_of, to_variables
from resnet_flax.weights.published import PUBLISHED, Published, fetch, recognize
from resnet_flax.weights.torch_layout import export_torch

# Attributes that do not decide what a network is.
_HOW = ("parent", "name", "dtype", "param_dtype", "scan", "remat", "ghost_batches", "norm_momentum")

# Attributes that decide what a network computes and that shapes do not, or not always, tell.
_FUNCTION = (
    *("block", "shortcut", "stride_on", "preactivation", "stem", "stem_pool"),
    *("avg_down", "norm"),
)

# What a variant's name says; other axes may be changed under the same name.
_SAID = (
    "stage_sizes",
    "groups",
    "width_per_group",
    "stride_on",
    "shortcut",
    "preactivation",
    "stem",
)


class Pretrained(NamedTuple):
    """A network with weights, and all that is needed to use it.

    Attributes:
      model: the network.
      variables: `params` and `batch_stats`.
      preprocessing: what its images go through; None where nothing says.
      class_names: of its outputs; empty where nothing says.
      origin: where the weights come from, for a person.
      sha256: of the file, empty for a checkpoint.
      config: of the training, where it is a checkpoint of ours; else empty.
      assumed: nothing says so, the preprocessing is only the usual one.
    """

    model: ResNet
    variables: dict[str, Any]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...]
    origin: str
    sha256: str = ""
    config: Mapping[str, Any] = {}
    assumed: bool = False


def load_pretrained(
    name_or_path: str | Path, model: ResNet, *, reset_head: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Weights for a network.

    Args:
      name_or_path: a published name such as 'resnet50.tv2_in1k' (fetched once and kept), a weights
        file (safetensors, torch's .pth, .caffemodel, .npz), or a workdir or checkpoint of ours.
      model: the network that they are for, of any `dtype`, `scan` and `num_classes`.
      reset_head: where the weights are for another number of classes, keep the head as it is
        initialised.
      seed: of that head.

    Returns:
      `{'params': ..., 'batch_stats': ...}`, what `model.apply` takes, in `model.param_dtype`.

    Raises:
      UserError: they cannot be found or read, or do not fit; then all that is missing, unexpected
        or of another shape is named.
    """
    name = str(name_or_path)
    if _is_checkpoint(Path(name)):
        found = _open_checkpoint(Path(name))
        arrays = export_torch(found.variables, found.model, layout_of(found.model))
        variables = to_variables(arrays, model, name, reset_head=reset_head, seed=seed)
        _require(_function_of(found.model), name, model)
        return variables
    path = fetch(name) if name in PUBLISHED else Path(name)
    if not name or not path.exists():
        raise UserError(_no_such(name))
    file = read_weights(path)
    variables = to_variables(file.arrays, model, name, reset_head=reset_head, seed=seed)
    _require(_function(file, name), name, model)
    return variables


def _function(file: WeightsFile, name: str) -> dict[str, Any]:
    """The axes that a file's weights need whatever their shapes, as far as anything says."""
    known = PUBLISHED.get(name) or PUBLISHED.get(recognize(file.sha256))
    if known:
        return _function_of(create_model(known.variant, **dict(known.axes)))
    if file.caffe:
        return {"stride_on": "1x1", "stem_pool": "ceil"}
    return _function_of(_described(file.about, name)[0]) if file.about else {}


def _function_of(model: ResNet) -> dict[str, Any]:
    return {axis: getattr(model, axis) for axis in _FUNCTION}


def _require(wanted: dict[str, Any], name: str, model: ResNet) -> None:
    """Raises UserError where weights fit in shape, but are another function's."""
    different = [
        f"{axis}={value!r}, not {getattr(model, axis)!r}"
        for axis, value in wanted.items()
        if getattr(model, axis) != value
    ]
    if different:
        raise UserError(f"{name} is for a network with {', '.join(different)}; give such a one")


def open_pretrained(
    what: str, *, variant: str = "", weights: str = "", dtype: Any = None
) -> Pretrained:
    """A network with weights, by what a command line calls a model.

    Args:
      what: a published name, a weights file, a workdir or checkpoint of ours, or a variant whose
        weights `weights` gives.
      variant: of a weights file, where its shapes do not decide it.
      weights: a weights file or published name, where `what` is a variant.
      dtype: of the computation; float32, or what the run had, by default.

    Raises:
      UserError: there is no such thing, it cannot be read, or what network it is for is open.
    """
    if weights:
        if variant not in ("", what):
            raise UserError(f"the network is named twice, {what} and {variant}; leave one out")
        what, variant = weights, what
    if not what:
        raise UserError("the name of the model is empty; give a published name, file or workdir")
    path = Path(what)
    if _is_checkpoint(path):
        if variant:
            raise UserError(f"{what} says itself which network it holds; leave {variant} out")
        return _open_checkpoint(path, dtype)
    published = PUBLISHED.get(what)
    if published:
        path = fetch(what)
    elif path.is_dir():
        raise UserError(f"{what} holds no checkpoints; give a workdir of a run, or a weights file")
    elif not path.exists():
        if what in VARIANTS:
            near = [name for name in PUBLISHED if name.partition(".")[0] == what]
            hint = f", or one of {', '.join(near)}" if near else ""
            raise UserError(f"{what} has no weights by itself; say --weights FILE{hint}")
        raise UserError(_no_such(what))
    file = read_weights(path)
    if published is None and (name := recognize(file.sha256)):
        what, published = name, PUBLISHED[name]
    return _open_file(file, what, variant, published, dtype)


def _open_file(
    file: WeightsFile, what: str, variant: str, published: Published | None, dtype: Any
) -> Pretrained:
    preprocessing: Preprocessing | None = None
    names: tuple[str, ...] = ()
    if published:
        model = create_model(
            published.variant, num_classes=published.classes, **dict(published.axes)
        )
        preprocessing, names = published.preprocessing, published.class_names
    elif file.about:
        model, preprocessing, names = _described(file.about, what)
    elif variant:
        axes: dict[str, Any] = {"stem_pool": "ceil"} if file.caffe else {}
        if "conv1.bias" in file.arrays:
            axes["stem_bias"] = True
        model = create_model(variant, num_classes=classes_of(file.arrays, what), **axes)
    else:
        model = infer(file.arrays, what)
    if variant and (published or file.about):
        asked = create_model(variant, num_classes=model.num_classes)
        if any(getattr(asked, axis) != getattr(model, axis) for axis in _SAID):
            raise UserError(f"{what} says itself that it is no {variant}; leave {variant} out")
    if file.caffe and not published:
        _require(_function(file, what), what, model)
        preprocessing = PUBLISHED["resnet50_v1.caffe_in1k"].preprocessing
    assumed = preprocessing is None and model.stem != "cifar"
    if assumed:
        preprocessing = Preprocessing()  # what most of these were trained with
    variables = to_variables(file.arrays, model, what)
    model = model.clone(dtype=jnp.dtype(dtype or jnp.float32))
    return Pretrained(model, variables, preprocessing, names, what, file.sha256, assumed=assumed)


def _described(about: Any, what: str) -> tuple[ResNet, Preprocessing | None, tuple[str, ...]]:
    """What a file of ours says of itself, which anyone may have written."""
    try:
        model = create_model("resnet18", **renamed.attributes(about["axes"]))
        preprocessing = about["preprocessing"]
        names = tuple(about["class_names"])
        if not isinstance(preprocessing, dict) or not all(isinstance(n, str) for n in names):
            raise TypeError("of other types")
        if len(names) not in (0, model.num_classes):
            raise ValueError(f"{len(names)} names for {model.num_classes} classes")
        return model, Preprocessing.from_json(preprocessing) if preprocessing else None, names
    except Exception as error:  # of all kinds
        raise UserError(
            f"{what} describes itself in a way that cannot be used ({first_line(error)}); export "
            "it again"
        ) from error


def _is_checkpoint(path: Path) -> bool:
    return (path / "meta").is_dir() or (path / "checkpoints").is_dir()


def _open_checkpoint(path: Path, dtype: Any = None) -> Pretrained:
    """The newest whole checkpoint of a workdir, or the one that `path` is."""
    checkpoint = path if (path / "meta").is_dir() else newest(path / "checkpoints")
    try:
        meta = read_meta(checkpoint)
        variables = read_variables(checkpoint, meta)
    except DamagedError as error:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {error}; give an older one, such as "
            f"{path / 'checkpoints'}/STEP"
        ) from error
    names = tuple(meta["class_names"])
    model = configured_model(resolve(meta["config"]).model, num_classes=len(names))
    if dtype is not None:
        model = model.clone(dtype=jnp.dtype(dtype))
    return Pretrained(
        model,
        variables,
        Preprocessing.from_json(meta["preprocessing"]),
        names,
        f"step {meta['step']} of {path}",
        config=meta["config"],
    )


def _no_such(name: str) -> str:
    near = closest(name, [*PUBLISHED, *VARIANTS])
    return f"{name} is no file, no workdir and no published name{near}"


def export(pretrained: Pretrained, path: str | Path) -> None:
    """Writes safetensors under torchvision's names (timm's or akamaster's where it has none).

    torch loads it strictly; this package reads from it, beside the arrays, which network it is,
    its preprocessing and the names of its classes.
    """
    model = pretrained.model
    layout = layout_of(model)
    arrays = export_torch(pretrained.variables, model, layout)
    for name in [n for n in arrays if n.endswith(".running_mean")]:
        arrays[name.replace("running_mean", COUNTER)] = np.zeros((), np.int64)
    preprocessing = pretrained.preprocessing
    about = {
        "axes": {
            f.name: getattr(model, f.name)
            for f in dataclasses.fields(ResNet)
            if f.name not in _HOW and getattr(model, f.name) != f.default
        },
        "layout": layout,
        "preprocessing": preprocessing.to_json() if preprocessing else {},
        "class_names": list(pretrained.class_names),
        "origin": pretrained.origin,
    }
    write_weights(Path(path), arrays, about)

"""Loads networks with weights from any source, and exports them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.config import check, flatten
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, closest, listed
from resnet_flax.models import VARIANTS, ResNet, configured_model
from resnet_flax.models.attributes import check_dtype, checked
from resnet_flax.models.registry import changed, settable
from resnet_flax.runtime import storage
from resnet_flax.training.checkpoint_files import DamagedError, read_meta, read_variables
from resnet_flax.weights import description, hub, places
from resnet_flax.weights.catalog import CATALOG, recognize
from resnet_flax.weights.files import read_weights, write_weights
from resnet_flax.weights.fitting import fit_arrays, fit_variables
from resnet_flax.weights.identify import head_classes, identify, without_other_heads
from resnet_flax.weights.torch_layout import COUNTER, export_torch, layout_of


class Pretrained(NamedTuple):
    """A network with weights, and everything needed to use it.

    Attributes:
      model: the network.
      variables: `params` and `batch_stats`, for `model.apply`.
      preprocessing: of its images; None if unknown.
      class_names: of its outputs; empty if unknown.
      origin: where the weights come from, in words.
      sha256: of the file, empty for a checkpoint.
      config: of the training if it is a checkpoint of this package; else empty.
      assumed: whether the preprocessing is unknown and the usual one is assumed.
      fingerprints: of the "train" and "eval" images of the training, see `fingerprint.take`, if it
        is a checkpoint of this package.
      classes: of the weights' own head, 0 without one; `model` may have another.
    """

    model: ResNet
    variables: dict[str, Any]
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...]
    origin: str
    sha256: str = ""
    config: Mapping[str, Any] = {}
    assumed: bool = False
    fingerprints: Mapping[str, Any] = {}
    classes: int = 0


def load(
    what: str | Path,
    *,
    variant: str = "",
    weights: str | Path = "",
    model: ResNet | None = None,
    num_classes: int | None = None,
    overrides: Mapping[str, Any] | str = {},
    dtype: Any = None,
    reset_head: bool = False,
    seed: int = 0,
) -> Pretrained:
    """A network with its weights.

    Args:
      what: a published name such as 'resnet50.tv2_in1k' (downloaded once), a weights file
        (safetensors, torch's .pth, .caffemodel, .npz), a directory of the Hugging Face hub that
        timm or transformers wrote, a workdir or checkpoint of this package, or what `variant` may
        be, if its weights are given by `weights`. Where a file has several networks, 'FILE:NAME'
        says which, such as 'dino.pth:teacher'.
      variant: of a weights file, if its shapes do not decide it; or the published name of these
        weights or of such that the same preprocessing is for.
      weights: a weights file, if `what` is a variant or the published name of these weights; a
        published name, if `what` is a variant.
      model: the network to load the weights into, with any `dtype`, `scan` and `num_classes`; by
        default the one that they are from.
      num_classes: of the network, instead of `model`; 0 leaves out the head, so that the network
        returns features. By default those of the weights.
      overrides: other attributes of the network than the weights' network or variant has, such as
        `{"stem": "deep"}` or 'stem=deep avg_down=True'.
      dtype: of the computation; by default float32, or that of the run or `model`.
      reset_head: if the weights have no head of one linear layer, or one for another number of
        classes than `model` or `num_classes`, initialise a new one.
      seed: of that head.

    Returns:
      The network, its variables in its `param_dtype`, and what is known about them.

    Raises:
      UserError: there is no such thing, it cannot be read, its network is ambiguous, or it does not
        fit `model`; then the message has the pattern of what is missing, unexpected or of
        another shape, and three examples of each.
    """
    name = str(what)
    if weights:
        places.check_without_weights(name, str(weights))
        if variant not in ("", name):
            raise UserError(f"the network is named twice, {name} and {variant}; leave one out")
        name, variant = str(weights), name
    if variant and variant not in VARIANTS and variant not in CATALOG:
        near = closest(variant, [*VARIANTS, *CATALOG]) or "; resnet-flax models lists them"
        raise UserError(f"there is no model called {variant!r}{near}")
    if variant and model is not None:
        raise UserError(f"the network is given twice, as {variant} and as a model; leave one out")
    if overrides and model is not None:
        raise UserError("a model has its own attributes; leave overrides or model out")
    overrides = settable(overrides)
    if model is not None and num_classes is not None:
        raise UserError("a model has its own num_classes; leave num_classes or model out")
    if reset_head and model is None and num_classes is None:
        raise UserError("reset_head needs num_classes=, or model= with the other number of classes")
    if num_classes is not None:
        num_classes = checked({"num_classes": num_classes})["num_classes"]
    if dtype is not None:
        dtype = check_dtype("dtype", dtype)
    head = {"reset_head": reset_head, "seed": seed}
    if name and name not in CATALOG and name not in VARIANTS:
        name = str(storage.local(name))
        places.split(name)  # explains a path that cannot be looked for
    if not places.is_checkpoint(Path(name)):
        found = _load_file(name, variant, model, num_classes, overrides, head)
    elif variant:
        own = _network_of(read_meta(places.checkpoint(Path(name)))).name
        raise UserError(f"{name} already names its network, {own}; give {name} alone")
    else:
        found = _load_checkpoint(Path(name), model, num_classes, overrides, head)
    if len(found.class_names) != found.model.num_classes:
        found = found._replace(class_names=())  # they are those of another head
    if dtype is not None:
        found = found._replace(model=found.model.clone(dtype=dtype))
    return found


def load_pretrained(
    name_or_path: str | Path, model: ResNet, *, reset_head: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Weights for a network: `load(name_or_path, model=model, ...).variables`."""
    found = load(name_or_path, model=model, reset_head=reset_head, seed=seed)
    return found.variables


def _load_file(
    name: str,
    variant: str,
    model: ResNet | None,
    num_classes: int | None,
    overrides: Mapping[str, Any],
    head: Mapping[str, Any],
) -> Pretrained:
    """Published weights, or those in a file."""
    file, place = read_weights(*places.path_of(name)), places.split(name)[0]
    origin = name if name in CATALOG else recognize(file.sha256) or name
    described = description.describe(file, CATALOG.get(origin), name)
    classes = num_classes if model is None else model.num_classes
    if head["reset_head"] or classes == 0:
        file = without_other_heads(file)
    own_classes = head_classes(file.arrays, name)
    if origin not in CATALOG and not file.about and storage.is_directory(place):
        described = hub.describe(place, own_classes) or described
    if variant in CATALOG:
        published = CATALOG[variant]
        if origin == name and described.model is None:
            origin = f"{name}, as {variant}"
        described = description.as_published(described, published, own_classes, name)
        variant = published.variant
    if model is None:
        model = _with_classes(identify(file, described, variant, name, overrides), num_classes)
    variables = fit_arrays(file.arrays, model, name, **head)
    description.check_function(described.function, model, name)
    preprocessing = described.preprocessing
    assumed = preprocessing is None and model.stem != "cifar"
    if assumed:
        preprocessing = Preprocessing()  # the one that most of these were trained with
    names = described.class_names
    if file.left_out:
        origin += f" (without {listed(file.left_out)})"
    return Pretrained(
        *(model, variables, preprocessing, names, origin, file.sha256),
        assumed=assumed,
        classes=own_classes,
    )


def _network_of(meta: Mapping[str, Any]) -> Any:
    """The config's `model` of a checkpoint. Other keys may be those of a user's own tables."""
    saved = flatten(meta["config"])
    return check({key: value for key, value in saved.items() if key.startswith("model.")}).model


def _with_classes(model: ResNet, num_classes: int | None) -> ResNet:
    return model if num_classes is None else model.clone(num_classes=num_classes)


def _load_checkpoint(
    path: Path,
    model: ResNet | None,
    num_classes: int | None,
    overrides: Mapping[str, Any],
    head: Mapping[str, Any],
) -> Pretrained:
    """The newest whole checkpoint of a workdir, or the one that `path` is."""
    checkpoint = places.checkpoint(path)
    try:
        meta = read_meta(checkpoint)
        variables = read_variables(checkpoint, meta)
    except DamagedError as error:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {error}; give an older one, such as "
            f"{path / 'checkpoints'}/STEP"
        ) from error
    names = tuple(meta["class_names"])
    try:
        trained = configured_model(_network_of(meta), num_classes=len(names))
    except UserError as error:
        raise UserError(
            f"the network of {path} cannot be made here: {error}; if its block or normalization is "
            "your own, import the Python file that adds it first, and load the network from Python"
        ) from error
    if num_classes is not None or overrides:
        model = changed(_with_classes(trained, num_classes), overrides)
    if model is not None:
        variables = fit_variables(variables, model, str(path), **head)
        description.check_function(description.function_of(trained), model, str(path))
    return Pretrained(
        trained if model is None else model,
        variables,
        Preprocessing.from_json(meta["preprocessing"]),
        names,
        f"step {meta['step']} of {path}",
        config=meta["config"],
        fingerprints=meta.get("data", {}),
        classes=trained.num_classes,
    )


def export(pretrained: Pretrained, path: str | Path) -> None:
    """Writes safetensors with torchvision's names (or timm's or akamaster's, if it has none).

    torch can load it strictly; this package also reads from it the network, its preprocessing and
    the names of its classes.
    """
    model, variables, preprocessing, class_names, origin, *_ = pretrained
    arrays = export_torch(variables, model, layout_of(model))
    for name in [n for n in arrays if n.endswith(".running_mean")]:
        arrays[name.replace("running_mean", COUNTER)] = np.zeros((), np.int64)
    about = description.to_json(model, preprocessing, class_names, origin)
    write_weights(Path(path), arrays, about)

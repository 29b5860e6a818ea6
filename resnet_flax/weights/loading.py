"""Weights into networks, and networks into weights."""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.config import resolve
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, closest, first_line
from resnet_flax.models import VARIANTS, ResNet, configured_model, create_model
from resnet_flax.models.stacking import stack
from resnet_flax.train.checkpoint import DamagedError, newest, read_meta, read_variables
from resnet_flax.weights.files import Arrays, WeightsFile, read_weights, write_weights
from resnet_flax.weights.published import PUBLISHED, Published, fetch, recognize
from resnet_flax.weights.torch_layout import export_torch, flatten, from_torch, torch_name

# Attributes that do not decide what a network is.
_HOW = ("parent", "name", "dtype", "param_dtype", "scan", "remat", "norm_groups", "norm_momentum")

# Attributes that decide what a network computes and that shapes do not, or not always, tell.
_FUNCTION = (
    *("block", "shortcut", "stride_on", "preactivation", "stem", "stem_pool"),
    *("shortcut_pool", "norm"),
)

# What a variant's name says; other axes may be changed under the same name.
_SAID = ("stage_sizes", "groups", "group_width", "stride_on", "shortcut", "preactivation", "stem")

# torch counts batches; nothing here depends on it.
_COUNTER = "num_batches_tracked"


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
        return to_variables(arrays, model, name, reset_head=reset_head, seed=seed)
    path = fetch(name) if name in PUBLISHED else Path(name)
    if not name or not path.exists():
        raise UserError(_no_such(name))
    file = read_weights(path)
    variables = to_variables(file.arrays, model, name, reset_head=reset_head, seed=seed)
    _check_function(file, name, model)
    return variables


def _check_function(file: WeightsFile, name: str, model: ResNet) -> None:
    """Raises UserError where the weights fit in shape, but are another function's."""
    known = PUBLISHED.get(name) or PUBLISHED.get(recognize(file.sha256))
    wanted: dict[str, Any] = {}
    if known:
        theirs = create_model(known.variant, **dict(known.axes))
        wanted = {axis: getattr(theirs, axis) for axis in _FUNCTION}
    elif file.caffe:
        wanted = {"stride_on": "1x1", "stem_pool": "ceil"}
    elif file.about:
        theirs = _described(file.about, name)[0]
        wanted = {axis: getattr(theirs, axis) for axis in _FUNCTION}
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
        model = create_model(variant, num_classes=_classes(file.arrays, what), **axes)
    else:
        model = _inferred(file.arrays, what)
    if variant and (published or file.about):
        asked = create_model(variant, num_classes=model.num_classes)
        if any(getattr(asked, axis) != getattr(model, axis) for axis in _SAID):
            raise UserError(f"{what} says itself that it is no {variant}; leave {variant} out")
    if file.caffe and not published:
        _check_function(file, what, model)
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
        model = create_model("resnet18", **about["axes"])
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
            "it anew"
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


def layout_of(model: ResNet) -> str:
    """The names under which a network's weights are known in torch, see `torch_name`.

    torchvision's and timm's where these have such networks.
    """
    if model.preactivation:
        return "timm_v2"
    if model.stem == "cifar" and model.shortcut in ("A", "none") and not model.squeeze:
        return "akamaster"
    return "timm"


def to_variables(
    arrays: Arrays, model: ResNet, origin: str, *, reset_head: bool = False, seed: int = 0
) -> dict[str, Any]:
    """A network's variables of arrays by torch's names.

    Args:
      arrays: see `files.read_weights`.
      model: the network.
      origin: of the arrays, for errors.
      reset_head: see `load_pretrained`.
      seed: see `load_pretrained`.

    Raises:
      UserError: something is missing, unexpected or of another shape; all of it is named.
    """
    plain, layout = model.clone(scan=False, remat=0), layout_of(model)
    arrays = {name: a for name, a in arrays.items() if not name.endswith(_COUNTER)}
    expected = _expected(plain, layout, _channels(arrays))
    wanted = {name: shape for name, (_, shape) in expected.items()}
    given = {name: a.shape for name, a in arrays.items()}
    heads = _head_names(plain, layout)
    classes = {given[name][0] for name in heads if given.get(name)}
    others = heads <= given.keys() and len(classes) == 1 and classes != {model.num_classes}
    if others and not reset_head:
        raise UserError(
            f"{origin} is for {classes.pop()} classes, the network has {model.num_classes}; ask "
            "for a new head by reset_head=True, or give the network as many"
        )
    keep = heads if others else set()
    _compare(given, wanted, keep, origin)
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, ((collection, path), _) in expected.items():
        if name not in keep:
            _put(variables[collection], path, from_torch(path, arrays[name]))
    variables = jax.tree.map(partial(jnp.asarray, dtype=model.param_dtype), variables)
    if keep:
        shape = variables["params"]["stem"]["conv1"]["kernel"].shape
        images = jnp.zeros((1, model.stride, model.stride, shape[2]))
        fresh = jax.jit(lambda: plain.init(jax.random.key(seed), images, train=False))()
        variables["params"]["head"] = fresh["params"]["head"]
    return stack(variables) if model.scan else variables


def _compare(given: dict[str, Any], wanted: dict[str, Any], besides: set[str], origin: str) -> None:
    """Raises UserError, naming all that is missing, unexpected or of another shape."""
    given, wanted = (
        {name: shape for name, shape in shapes.items() if name not in besides}
        for shapes in (given, wanted)
    )
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    other = [
        f"{name} {list(given[name])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if missing or unexpected or other:
        parts = [
            f"{len(names)} {what} ({', '.join(names)})"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", other),
            )
            if names
        ]
        raise UserError(
            f"{origin} does not fit the network: {'; '.join(parts)}; give the network that it was "
            "made for"
        )


def _expected(
    model: ResNet, layout: str, channels: int
) -> dict[str, tuple[tuple[str, str], tuple[int, ...]]]:
    """Of each array by torch's name: our collection and path, and its shape there."""
    side = max(model.stride, 32)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)), train=False)
    )
    # Broadcast zeros take no memory, whatever the network.
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    names = {torch_name(path, model, layout): (c, path) for c, path in flatten(empty)}
    arrays = export_torch(empty, model, layout)
    return {name: (names[name], array.shape) for name, array in arrays.items()}


def _head_names(model: ResNet, layout: str) -> set[str]:
    return {torch_name(f"head/{leaf}", model, layout) for leaf in ("kernel", "bias")}


def _channels(arrays: Arrays) -> int:
    """Of the images: whatever the stem's first convolution takes."""
    for name in ("conv1.weight", "conv1.0.weight", "stem.conv.weight"):
        if name in arrays and arrays[name].ndim == 4:
            return max(1, arrays[name].shape[1])
    return 3


def _put(tree: dict[str, Any], path: str, array: np.ndarray) -> None:
    *modules, leaf = path.split("/")
    for module in modules:
        tree = tree.setdefault(module, {})
    tree[leaf] = array


def _classes(arrays: Arrays, what: str) -> int:
    for name in ("fc.bias", "linear.bias", "head.fc.bias"):
        if name in arrays and arrays[name].ndim == 1:
            return len(arrays[name])
    raise UserError(f"{what} has no head that is known here (fc, linear or head.fc)")


def _inferred(arrays: Arrays, what: str) -> ResNet:
    """The network that a file's names and shapes are of, if they are of one only."""
    classes = _classes(arrays, what)
    names = {name: a.shape for name, a in arrays.items() if not name.endswith(_COUNTER)}
    found: dict[ResNet, str] = {}
    for variant in VARIANTS:
        model = create_model(variant, num_classes=classes)
        if model in found or _sizes(names) != model.stage_sizes:
            continue  # another name of the same network, or not worth a trace
        expected = _expected(model, layout_of(model), _channels(arrays))
        if {name: shape for name, (_, shape) in expected.items()} == names:
            found[model] = variant
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise UserError(
            f"the names and shapes in {what} are of no network that is known here; say by --model "
            f"which one it is to be compared with ({', '.join(list(VARIANTS)[:6])}, ...)"
        )
    raise UserError(
        f"{what} fits {' and '.join(found.values())}, which have the same shapes; say which by "
        "--model"
    )


def _sizes(names: Any) -> tuple[int, ...]:
    """Blocks of each stage, by the names."""
    blocks: dict[int, int] = {}
    for name in names:
        match = re.match(r"(?:layer|stages\.)(\d+)\.(?:blocks\.)?(\d+)\.", name)
        if match:
            stage, block = map(int, match.groups())
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    return tuple(blocks[stage] for stage in sorted(blocks))


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
        arrays[name.replace("running_mean", _COUNTER)] = np.zeros((), np.int64)
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

"""Arrays by torch's names into a network's variables, and which network they are of."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.models.scan import stack
from resnet_flax.weights.files import Arrays
from resnet_flax.weights.torch_layout import export_torch, flatten, from_torch, torch_name

# torch counts batches; nothing here depends on it.
COUNTER = "num_batches_tracked"


def layout_of(model: ResNet) -> str:
    """The names under which a network's weights are known in torch, see `torch_name`.

    torchvision's and timm's where these have such networks.
    """
    if model.preactivation:
        return "timm_v2"
    if model.stem == "cifar" and model.shortcut in ("A", "none") and not model.se_ratio:
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
    arrays = {name: a for name, a in arrays.items() if not name.endswith(COUNTER)}
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


def classes_of(arrays: Arrays, what: str) -> int:
    """The number of classes that a file's head is for."""
    for name in ("fc.bias", "linear.bias", "head.fc.bias"):
        if name in arrays and arrays[name].ndim == 1:
            return len(arrays[name])
    raise UserError(f"{what} has no head that is known here (fc, linear or head.fc)")


def infer(arrays: Arrays, what: str) -> ResNet:
    """The network that a file's names and shapes are of, if they are of one only."""
    classes = classes_of(arrays, what)
    names = {name: a.shape for name, a in arrays.items() if not name.endswith(COUNTER)}

    def shapes_of(model: ResNet) -> dict[str, tuple[int, ...]]:
        expected = _expected(model, layout_of(model), _channels(arrays))
        return {name: shape for name, (_, shape) in expected.items()}

    found: dict[ResNet, str] = {}
    for variant in VARIANTS:
        model = create_model(variant, num_classes=classes)
        if model in found or _sizes(names) != model.stage_sizes:
            continue  # another name of the same network, or not worth a trace
        # Most differ in the first block of a stage, and that is soon traced.
        shallow = create_model(
            variant, num_classes=classes, stage_sizes=(1,) * len(model.stage_sizes)
        )
        if shapes_of(shallow).items() <= names.items() and shapes_of(model) == names:
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

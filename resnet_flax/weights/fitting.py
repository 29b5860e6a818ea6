"""A network's variables from weights: arrays by torch's names, or another network's variables."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_flax.errors import UserError
from resnet_flax.models import ResNet
from resnet_flax.models.scan import stack, unstack
from resnet_flax.weights.files import Arrays
from resnet_flax.weights.torch_layout import (
    COUNTER,
    export_torch,
    flatten,
    from_torch,
    layout_of,
    torch_name,
)

Shapes = dict[str, tuple[int, ...]]

STEM, HEAD = "params/stem/conv1/kernel", ("params/head/kernel", "params/head/bias")


def fit_arrays(
    arrays: Arrays, model: ResNet, origin: str, *, reset_head: bool = False, seed: int = 0
) -> dict[str, Any]:
    """A network's variables from arrays by torch's names.

    Args:
      arrays: see `files.read_weights`.
      model: the network, of any `dtype` and `scan`.
      origin: of the arrays, for errors.
      reset_head: see `loading.load`.
      seed: see `loading.load`.

    Raises:
      UserError: something is missing, unexpected or of another shape; the message names all of it.
    """
    arrays = {name: a for name, a in arrays.items() if not name.endswith(COUNTER)}
    expected = torch_shapes(model, arrays)
    given = {name: a.shape for name, a in arrays.items()}
    wanted = {name: shape for name, (_, shape) in expected.items()}
    head = [name for name, (path, _) in expected.items() if path in HEAD]
    new_head = _needs_new_head(given, head, 0, model, origin, reset_head)
    _check_shapes(given, wanted, head if new_head else (), origin)
    leaves = {
        path: from_torch(path.partition("/")[2], arrays[name])
        for name, (path, _) in expected.items()
        if not (new_head and path in HEAD)
    }
    return _variables(leaves, model, seed)


def fit_variables(
    variables: Mapping[str, Any],
    model: ResNet,
    origin: str,
    *,
    reset_head: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A network's variables from those of another that has the same parameters.

    Args:
      variables: `params` and `batch_stats`, of a scanned network or not.
      model: the network, of any `dtype` and `scan`.
      origin: of the variables, for errors.
      reset_head: see `loading.load`.
      seed: see `loading.load`.

    Raises:
      UserError: something is missing, unexpected or of another shape; the message names all of it.
    """
    leaves = flatten_dict(unstack(variables), sep="/")
    channels = leaves[STEM].shape[2] if STEM in leaves else 3
    given = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = {
        path: leaf.shape for path, leaf in flatten_dict(_abstract(model, channels), sep="/").items()
    }
    new_head = _needs_new_head(given, HEAD, -1, model, origin, reset_head)
    _check_shapes(given, wanted, HEAD if new_head else (), origin)
    if new_head:
        leaves = {path: leaf for path, leaf in leaves.items() if path not in HEAD}
    return _variables(leaves, model, seed)


def torch_shapes(model: ResNet, arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each array of a network's weights in torch: our path, and its shape in torch.

    Args:
      model: the network.
      arrays: weights, whose stem determines the channels of the images.
    """
    plain, layout = model.clone(scan=False, remat=0), layout_of(model)
    # Broadcast zeros take no memory.
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), _abstract(model, _channels(arrays))
    )
    paths = {
        torch_name(path, plain, layout): f"{collection}/{path}"
        for collection, path in flatten(empty)
    }
    shapes = export_torch(empty, plain, layout)
    return {name: (paths[name], array.shape) for name, array in shapes.items()}


def _abstract(model: ResNet, channels: int) -> Any:
    """Shapes and types of a network's variables, its blocks unrolled."""
    plain, side = model.clone(scan=False, remat=0), max(model.stride, 32)
    return jax.eval_shape(
        lambda: plain.init(jax.random.key(0), jnp.zeros((1, side, side, channels)), train=False)
    )


def _channels(arrays: Arrays) -> int:
    """The channels of the images: the inputs of the stem's first convolution."""
    for name in ("conv1.weight", "conv1.0.weight", "stem.conv.weight"):
        if name in arrays and arrays[name].ndim == 4:
            return max(1, arrays[name].shape[1])
    return 3


def _needs_new_head(
    given: Shapes, head: Iterable[str], axis: int, model: ResNet, origin: str, reset_head: bool
) -> bool:
    """Whether the weights are for another number of classes, the length of `axis` in the head.

    Raises:
      UserError: they are, and no new head is requested.
    """
    classes = {given[name][axis] for name in head if given.get(name)}
    is_whole = all(name in given for name in head) and len(classes) == 1
    if not is_whole or classes == {model.num_classes}:
        return False
    if not reset_head:
        raise UserError(
            f"{origin} is for {classes.pop()} classes, the network has {model.num_classes}; ask "
            "for a new head by reset_head=True, or give the network as many classes"
        )
    return True


def _check_shapes(given: Shapes, wanted: Shapes, ignored: Iterable[str], origin: str) -> None:
    """Raises UserError that names everything missing, unexpected or of another shape."""
    given, wanted = (
        {name: shape for name, shape in shapes.items() if name not in ignored}
        for shapes in (given, wanted)
    )
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {list(given[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ],
    }
    parts = [
        f"{len(names)} {what} ({', '.join(names)})" for what, names in problems.items() if names
    ]
    if parts:
        raise UserError(
            f"{origin} does not fit the network: {'; '.join(parts)}; give the network that it was "
            "made for"
        )


def _variables(leaves: Mapping[str, Any], model: ResNet, seed: int) -> dict[str, Any]:
    """The variables from leaves by path; a missing head is initialised."""
    tree = {"params": {}, "batch_stats": {}, **unflatten_dict(leaves, sep="/")}
    variables: dict[str, Any] = jax.tree.map(partial(jnp.asarray, dtype=model.param_dtype), tree)
    if not leaves.keys() & set(HEAD):
        plain = model.clone(scan=False, remat=0)
        images = jnp.zeros((1, model.stride, model.stride, leaves[STEM].shape[2]))
        fresh = jax.jit(lambda: plain.init(jax.random.key(seed), images, train=False))()
        variables["params"]["head"] = fresh["params"]["head"]
    return stack(variables) if model.scan else variables

"""A network's variables from weights: arrays by torch's names, or another network's variables."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_flax.errors import UserError, listed
from resnet_flax.models import ResNet
from resnet_flax.models.scan import stack, unstack
from resnet_flax.weights.formats import Arrays
from resnet_flax.weights.mismatch import Shapes, explain
from resnet_flax.weights.torch_layout import (
    COUNTER,
    export_torch,
    flatten,
    from_torch,
    layout_of,
    torch_name,
)

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
      UserError: something is missing, unexpected or of another shape; the message says how.
    """
    arrays = {name: a for name, a in arrays.items() if not name.endswith(COUNTER)}
    expected = torch_shapes(model, arrays)
    given = {name: a.shape for name, a in arrays.items()}
    wanted = {name: shape for name, (_, shape) in expected.items()}
    layout = layout_of(model)
    head = [torch_name(path.partition("/")[2], model, layout) for path in HEAD]
    ignored = _check(given, wanted, head, 0, model, origin, reset_head)
    whole = [name for name in expected if name not in ignored and arrays[name].dtype.kind in "biu"]
    if whole:
        raise UserError(
            f"{origin} has whole numbers in {listed(whole)}; give the floating-point weights of "
            "which they are a quantized form"
        )
    leaves = {
        path: from_torch(path.partition("/")[2], arrays[name])
        for name, (path, _) in expected.items()
        if name not in ignored
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
      UserError: something is missing, unexpected or of another shape; the message says how.
    """
    leaves = flatten_dict(unstack(variables), sep="/")
    channels = leaves[STEM].shape[2] if STEM in leaves else 3
    given = {path: leaf.shape for path, leaf in leaves.items()}
    wanted = {
        path: leaf.shape for path, leaf in flatten_dict(_abstract(model, channels), sep="/").items()
    }
    ignored = _check(given, wanted, HEAD, -1, model, origin, reset_head)
    leaves = {path: leaf for path, leaf in leaves.items() if path not in ignored}
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


def _check(
    given: Shapes,
    wanted: Shapes,
    head: Sequence[str],
    axis: int,
    model: ResNet,
    origin: str,
    reset_head: bool,
) -> Sequence[str]:
    """Checks that weights fit a network.

    Args:
      given: shapes of the weights.
      wanted: shapes of the network's variables.
      head: names of the head's arrays, whose length along `axis` is the number of classes.
      axis: see `head`.
      model: the network.
      origin: of the weights, for errors.
      reset_head: see `loading.load`.

    Returns:
      The names of arrays to leave out: those of the head, if the network has none or gets a new
      one.

    Raises:
      UserError: the weights are for another number of classes, or have no head, and no new head is
        requested; or something else does not fit, and the message says how.
    """
    classes = _classes(given, head, axis)
    differ = classes is not None and classes != model.num_classes
    left_out = head if differ or not model.num_classes else ()
    if differ and model.num_classes and not reset_head:
        if classes or not _differences(given, wanted, head):
            is_for = f"is for {classes} classes" if classes else "has no head"
            has = model.num_classes if classes else f"one for {model.num_classes} classes"
            mend = "as many classes" if classes else "num_classes=0"
            raise UserError(
                f"{origin} {is_for}, the network has {has}; ask for a new head by reset_head=True, "
                f"or give the network {mend}"
            )
        left_out = ()  # more than the head is missing, and all of it is named
    problems = _differences(given, wanted, left_out)
    if problems:
        raise UserError(
            f"{origin} does not fit the network: {problems}; give the network that it was made for"
        )
    return left_out


def _classes(given: Shapes, head: Sequence[str], axis: int) -> int | None:
    """The number of classes that weights are for, 0 without a head, None for a damaged head."""
    found = {given[name][axis] if given[name] else None for name in head if name in given}
    if not found:
        return 0
    is_whole = all(name in given for name in head) and len(found) == 1
    return found.pop() if is_whole else None


def _differences(given: Shapes, wanted: Shapes, left_out: Sequence[str]) -> str:
    """Everything missing, unexpected or of another shape, in words."""
    return explain(
        *(
            {name: shape for name, shape in shapes.items() if name not in left_out}
            for shapes in (given, wanted)
        )
    )


def _variables(leaves: Mapping[str, Any], model: ResNet, seed: int) -> dict[str, Any]:
    """The variables from leaves by path; a missing head is initialised."""
    tree = {"params": {}, "batch_stats": {}, **unflatten_dict(leaves, sep="/")}
    variables: dict[str, Any] = jax.tree.map(partial(jnp.asarray, dtype=model.param_dtype), tree)
    if model.num_classes and not leaves.keys() & set(HEAD):
        plain = model.clone(scan=False, remat=0)
        images = jnp.zeros((1, model.stride, model.stride, leaves[STEM].shape[2]))
        fresh = jax.jit(lambda: plain.init(jax.random.key(seed), images, train=False))()
        variables["params"]["head"] = fresh["params"]["head"]
    return stack(variables) if model.scan else variables

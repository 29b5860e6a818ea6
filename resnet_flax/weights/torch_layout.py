"""The names of our parameters in the state dictionaries of torch networks."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.models.resnet import ResNet
from resnet_flax.models.scan import unstack

Arrays = dict[str, np.ndarray]

# torch counts batches; the counter is not used here.
COUNTER = "num_batches_tracked"

# The names of a normalisation's arrays in torch.
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def layout_of(model: ResNet) -> str:
    """The layout of a network's names in torch, see `torch_name`.

    torchvision's or timm's, if these have such a network.
    """
    if model.preactivation:
        return "timm_v2"
    if model.stem == "cifar" and model.shortcut in ("A", "none") and not model.se_ratio:
        return "akamaster"
    return "timm"


def torch_name(path: str, model: ResNet, layout: str) -> str:
    """The key, in a torch state dictionary, of one of our variables.

    Args:
      path: of the variable, without its collection: 'stage1_block2/conv1/kernel'.
      model: the network, unrolled (`scan=False`).
      layout: 'torchvision' (whose ResNet, ResNeXt and wide names timm shares), 'timm' (its
        squeeze-and-excitation and deep stems as well), 'timm_v2' (its pre-activation networks)
        or 'akamaster' (pytorch_resnet_cifar10).
    """
    *modules, leaf = path.split("/")
    name = _module_name(modules, model, layout)
    is_norm = modules[-1].startswith("norm")
    return f"{name}.{_NORM[leaf] if is_norm else 'bias' if leaf == 'bias' else 'weight'}"


def _module_name(modules: list[str], model: ResNet, layout: str) -> str:
    first, *inner = modules
    if first == "head":
        return {"akamaster": "linear", "timm_v2": "head.fc"}.get(layout, "fc")
    if first == "norm":
        return "norm"
    if first == "stem":
        return _stem_name(inner[0], model, layout)
    stage, block = map(int, re.fullmatch(r"stage(\d+)_block(\d+)", first).groups())  # type: ignore[union-attr]
    prefix = f"layer{stage}.{block - 1}"
    if layout == "timm_v2":
        prefix = f"stages.{stage - 1}.blocks.{block - 1}"
    if inner[0] == "se":
        return f"{prefix}.se.{'fc1' if inner[1] == 'reduce' else 'fc2'}"
    if layout == "timm_v2":
        return f"{prefix}.{'downsample.conv' if inner[0] == 'shortcut' else inner[0]}"
    if inner[0] == "shortcut":
        if layout == "akamaster":
            raise UserError("the layout akamaster has no projections; use shortcut='A'")
        first_index = 1 if model.avg_down else 0  # in torch the pooling is number 0
        return f"{prefix}.downsample.{first_index + (inner[1] == 'norm')}"
    return f"{prefix}.{inner[0].replace('norm', 'bn')}"


def _stem_name(module: str, model: ResNet, layout: str) -> str:
    if layout == "timm_v2":
        return f"stem.{module if model.stem == 'deep' else module[:-1]}"
    if model.stem == "deep":
        # In torch a sequence of convolution, normalisation, activation, ...; the last one is
        # outside.
        number = int(module[-1])
        if module == "norm3":
            return "bn1"
        return f"conv1.{3 * (number - 1) + (module.startswith('norm'))}"
    return module.replace("norm", "bn")


def to_torch(path: str, array: np.ndarray, layout: str) -> np.ndarray:
    """One of our arrays in torch's order of axes: HWIO as OIHW, `[in, out]` as `[out, in]`."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2:
        array = array.T
        # Some dense layers are 1x1 convolutions in torch.
        return array[..., None, None] if _is_convolution(path, layout) else array
    return array


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if not path.endswith("/kernel"):
        return array
    if "/se/" in path or path.startswith("head/"):
        return array.reshape(array.shape[:2]).T
    return array.transpose(2, 3, 1, 0)


def _is_convolution(path: str, layout: str) -> bool:
    return "/se/" in path or (layout == "timm_v2" and path.startswith("head/"))


def flatten(variables: Mapping[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """`{(collection, path): array}` of a network's variables."""
    flat: dict[tuple[str, str], np.ndarray] = {}

    def walk(collection: str, tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(collection, value, f"{prefix}{name}/")
            else:
                flat[collection, prefix + name] = np.asarray(value)

    for collection, tree in variables.items():
        walk(collection, tree, "")
    return flat


def export_torch(variables: Mapping[str, Any], model: ResNet, layout: str) -> Arrays:
    """A torch state dictionary as arrays, without torch's counters of batches.

    Args:
      variables: `params` and `batch_stats`, scanned or not.
      model: the network.
      layout: see `torch_name`.
    """
    return {
        torch_name(path, model, layout): to_torch(path, array, layout)
        for (_, path), array in flatten(unstack(variables)).items()
    }

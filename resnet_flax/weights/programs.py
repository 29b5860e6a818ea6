"""The names of other programs' residual networks, as torchvision has them.

A program is recognized by one of its names. What tells networks apart that have the same names and
shapes is listed with it; programs that are known, but have no network that equals one of ours, are
refused with the reason.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.errors import UserError

Arrays = dict[str, np.ndarray]
Replacement = str | Callable[[re.Match[str]], str]


class Program(NamedTuple):
    """A program that names the parameters of a residual network in its own way.

    Attributes:
      names: the programs that have these names.
      mark: the pattern of a name that no others have.
      renames: patterns of the beginning of a name, and what takes their place.
      function: attributes of its networks that the shapes do not tell.
    """

    names: str
    mark: str
    renames: tuple[tuple[str, Replacement], ...]
    function: Mapping[str, Any] = {}


def _in_sequence(match: re.Match[str]) -> str:
    """Of a sequence of convolution, normalization, ReLU, convolution, ...: what has parameters."""
    stage, block, place = map(int, match.groups())
    if place % 3 == 2:  # a ReLU: not of that program
        return match[0]
    return f"layer{stage - 1}.{block}.{('conv', 'bn')[place % 3]}{place // 3 + 1}."


def _layer(match: re.Match[str]) -> str:
    """A layer of transformers, which counts from 0."""
    stage, block, number, kind = match.groups()
    return f"layer{int(stage) + 1}.{block}.{_KINDS[kind]}{int(number) + 1}."


def _shortcut(match: re.Match[str]) -> str:
    stage, block, kind = match.groups()
    return f"layer{int(stage) + 1}.{block}.downsample.{[*_KINDS].index(kind)}."


_KINDS = {"convolution": "conv", "normalization": "bn"}
_KIND = "(convolution|normalization)"
_LAYER = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\."

PROGRAMS = (
    # Also what many have from kuangliu; akamaster's with option B.
    Program(
        "kuangliu/pytorch-cifar or akamaster/pytorch_resnet_cifar10",
        r"layer\d\.\d+\.shortcut\.1\.weight",
        ((r"(layer\d\.\d+)\.shortcut\.", r"\1.downsample."), (r"linear\.", "fc.")),
        {"stride_on": "3x3"},
    ),
    Program(
        "weiaicunzai/pytorch-cifar100",
        r"conv\d_x\.\d+\.residual_function\.0\.weight",
        (
            (r"conv1\.0\.", "conv1."),
            (r"conv1\.1\.", "bn1."),
            (r"conv(\d)_x\.(\d+)\.residual_function\.(\d)\.", _in_sequence),
            (
                r"conv(\d)_x\.(\d+)\.shortcut\.",
                lambda match: f"layer{int(match[1]) - 1}.{match[2]}.downsample.",
            ),
        ),
        {"stride_on": "3x3"},
    ),
    # Whose config.json says which convolution has the stride.
    Program(
        "transformers",
        r"(resnet\.)?embedder\.embedder\.convolution\.weight",
        (
            (
                rf"(?:resnet\.)?embedder\.embedder\.{_KIND}\.",
                lambda match: f"{_KINDS[match[1]]}1.",
            ),
            (rf"{_LAYER}layer\.(\d)\.{_KIND}\.", _layer),
            (rf"{_LAYER}shortcut\.{_KIND}\.", _shortcut),
            (r"classifier\.1\.", "fc."),
        ),
    ),
)

# The pattern of a name, and what no network of ours does.
_OTHERS = (
    (
        r"layer\d\.\d+\.fc1\.weight",
        "the squeeze-and-excitation blocks of kuangliu/pytorch-cifar",
    ),
    (
        r"(stage\d|conv\d_x)\.\d+\.residual\.0\.weight",
        "blocks as in the pre-activation, squeeze-and-excitation and stochastic depth networks of "
        "weiaicunzai/pytorch-cifar100, whose convolutions have biases",
    ),
    (
        r"conv\d\.\d+\.split_transforms\.0\.weight",
        "blocks as in the ResNeXt of weiaicunzai/pytorch-cifar100, whose first convolution has "
        "groups too",
    ),
    (
        r"(bit\.)?embedder\.convolution\.weight",
        "the standardized convolutions of transformers' BiT",
    ),
)


class Renamed(NamedTuple):
    """Arrays by torchvision's names.

    Attributes:
      arrays: all of them.
      function: attributes of their network that the shapes do not tell, as far as known.
    """

    arrays: Arrays
    function: Mapping[str, Any]


def renamed(arrays: Arrays, origin: str) -> Renamed:
    """The arrays of another program's network by torchvision's names, if it is a known program.

    Args:
      arrays: by the names in a file.
      origin: of the file, for errors.

    Raises:
      UserError: it is a program whose networks do not equal any of ours.
    """
    _refuse_others(arrays, origin)
    for program in PROGRAMS:
        if any(re.fullmatch(program.mark, name) for name in arrays):
            by_name = {_renamed(name, program): array for name, array in arrays.items()}
            if len(by_name) == len(arrays):
                return Renamed(by_name, program.function)
    return Renamed(arrays, {})


def _renamed(name: str, program: Program) -> str:
    for pattern, replacement in program.renames:
        found, count = re.subn(rf"\A{pattern}", replacement, name)
        if count:
            return found
    return name


def _refuse_others(arrays: Arrays, origin: str) -> None:
    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in arrays)

    why = next((why for pattern, why in _OTHERS if has(pattern)), "")
    projects, norms = (has(rf"layer\d\.\d+\.shortcut\.{place}\.weight") for place in (0, 1))
    stem = arrays["conv1.weight"].shape[2:] if "conv1.weight" in arrays else ()
    if projects and not norms:
        why = (
            "pre-activation blocks as in kuangliu/pytorch-cifar, where nothing is normalized "
            "before the head"
        )
    elif projects and stem == (1, 1):
        why = "the ResNeXt of kuangliu/pytorch-cifar, whose stem is a 1x1 convolution"
    if why:
        raise UserError(
            f"{origin} has the names of {why}; no network here is the same: give weights of one "
            "that resnet-flax models lists"
        )
    wider = arrays.get("layer2.0.conv1.weight", np.zeros((1, 1, 1, 1)))
    others = r".*(downsample|shortcut|\.se|layer4|conv3)\..*"
    is_cifar = "fc.weight" in arrays and stem == (3, 3) and not has(others)
    if is_cifar and wider.ndim == 4 and len(wider) > wider.shape[1] > 1:
        raise UserError(
            f"{origin} has shortcuts without parameters and a head called fc, and programs with "
            "such names add zero channels in different ways; if half of them are on either side, "
            "as in akamaster/pytorch_resnet_cifar10, call the head linear"
        )

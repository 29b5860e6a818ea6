"""Which of the tensors in a weights file are those of one network.

A checkpoint may have the network below keys of its training program (`state.model`), under the
names of wrappers (`module.`) or of a larger network (`backbone.`), and may have several: the
weights and their running average, a student and its teacher, a query and a key encoder. The place
is found by the names of a residual network's first block, not guessed from a list of prefixes.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from resnet_flax.errors import UserError, listed

# An array of the first block, and what precedes its name.
_FIRST_BLOCK = re.compile(
    r"(|.*?\.)(?:"
    r"layer1\.0\.(?:conv|bn|norm)\d\.\w+"  # torchvision, timm, akamaster
    r"|stages\.0\.blocks\.0\.(?:conv|norm)\d\.\w+"  # timm's pre-activation networks
    r"|conv2_x\.0\.residual_function\.0\.\w+"  # weiaicunzai
    r"|(?:resnet\.)?encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight"  # transformers
    r")"
)

# Prefixes that wrappers add to all names of a network, for networks that are not recognized.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

# The root of the names of a network without its head, and where that head is, in mmpretrain.
_BACKBONE, _ITS_HEAD = "backbone.", "head.fc."


class Node(NamedTuple):
    """A dictionary of tensors in a file.

    Attributes:
      path: the keys that lead to it, such as 'state.model'; empty for a file of tensors only.
      tensors: by their names; each has a `shape`.
    """

    path: str
    tensors: dict[str, Any]


class Network(NamedTuple):
    """The tensors of a network.

    Attributes:
      tensors: by their names in the network, without what precedes them in the file.
      left_out: names of the other tensors of the same dictionary, without counters.
    """

    tensors: dict[str, Any]
    left_out: tuple[str, ...]


def choose(nodes: Sequence[Node], address: str, origin: str) -> Network:
    """The tensors of the only network in a file, or of the one that is asked for.

    Args:
      nodes: the dictionaries of tensors in the file.
      address: of the network: all or some of the keys and names that lead to it, such as 'teacher';
        '.' for the one without any, and empty for the only one.
      origin: of the file, for errors.

    Raises:
      UserError: there is none, or more than one and `address` does not say which.
    """
    networks = [
        (_joined(node.path, root), node, root) for node in nodes for root in _roots(node.tensors)
    ]
    if not networks:  # of a kind that is not recognized: the state dictionaries
        networks = [(node.path, node, "") for node in _state_dicts(nodes)]
    if not networks:
        raise UserError(f"{origin} has no state dictionary of tensors; give a file of weights")
    names = [name or "." for name, _, _ in networks]
    fit = [network for network in networks if address in ("", network[0] or ".")]
    fit = fit or [network for network in networks if f".{address}." in f".{network[0]}."]
    if not fit:
        raise UserError(f"{origin} has no network {address}; it has {listed(names, 8)}")
    if len(fit) > 1:
        several = [name or "." for name, _, _ in fit]
        if len({*several}) == 1:
            raise UserError(
                f"{origin} has {len(fit)} networks that are all called {several[0]}; save the one "
                "to use in a file of its own"
            )
        raise UserError(
            f"{origin} has {len(fit)} networks, {listed(several, 8)}; add the name of the one to "
            f"use, such as {origin}:{several[0]}"
        )
    return _network(*fit[0][1:])


def _roots(names: Iterable[str]) -> list[str]:
    """What precedes the names of residual networks."""
    found = (_FIRST_BLOCK.fullmatch(name) for name in names)
    return list(dict.fromkeys(match[1] for match in found if match))


def _joined(path: str, root: str) -> str:
    return f"{path}.{root}".strip(".")


def _state_dicts(nodes: Sequence[Node]) -> list[Node]:
    """Those with names of modules, which single tensors beside a state dictionary do not have."""
    several = [n for n in nodes if any(tensor.shape for tensor in n.tensors.values())]
    return [n for n in nodes if any("." in name for name in n.tensors)] or several


def _network(node: Node, root: str) -> Network:
    """The tensors below a root. Those below a longer one are of a network inside this one."""
    inside = [other for other in _roots(node.tensors) if other != root and other.startswith(root)]
    tensors = {
        name.removeprefix(root): tensor
        for name, tensor in node.tensors.items()
        if name.startswith(root) and not name.startswith(tuple(inside))
    }
    taken = {f"{root}{name}" for name in tensors}
    if root.endswith(_BACKBONE):
        head = f"{root.removesuffix(_BACKBONE)}{_ITS_HEAD}"
        for name in [name for name in node.tensors if name.startswith(head)]:
            tensors[f"fc.{name.removeprefix(head)}"] = node.tensors[name]
            taken.add(name)
    left_out = [n for n, t in node.tensors.items() if n not in taken and t.shape]
    return Network(_unwrapped(tensors), tuple(left_out))


def _unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """Removes the prefixes of wrappers, and their counters."""

    def whole(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors) and all(
            name.startswith(prefix) or not tensor.shape for name, tensor in tensors.items()
        )

    while prefix := next((p for p in _WRAPPERS if whole(p)), None):
        tensors = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return tensors

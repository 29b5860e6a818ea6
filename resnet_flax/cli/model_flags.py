"""The argument MODEL and the flags that say which network it is, for every verb that has one."""

import argparse
from typing import TYPE_CHECKING, Any

from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import model
from resnet_flax.schema import NETWORK_FIELDS

if TYPE_CHECKING:
    from resnet_flax.models.variants import Overrides
    from resnet_flax.weights.loading import Pretrained


def add_model(parser: Parser) -> argparse._ArgumentGroup:
    """Adds MODEL and its flags; returns their group."""
    parser.add_argument(
        "model_name",
        type=model,
        metavar="MODEL",
        help="The workdir of a run, the name of published weights, a file of weights (FILE:NAME if "
        "it has several networks), a directory of the Hugging Face hub, or the name of a network "
        "whose weights --weights gives.",
    )
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="A file of weights where MODEL is the name of their network, or their published name, "
        "which also tells the preprocessing; or published weights for the network MODEL.",
    )
    group.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="The name of the network of a file of weights, needed if the shapes of the weights "
        "fit more than one; or the published name of the weights in it.",
    )
    add_overrides(group)
    return group


def add_overrides(group: argparse._ActionsContainer) -> None:
    """Adds `--overrides`."""
    group.add_argument(
        *("--overrides", "--axes"),
        dest="overrides",
        action="append",
        default=[],
        metavar="'KEY=VALUE KEY=VALUE'",
        help="Changes to the network, in one quoted string with spaces between them, such as "
        f"'shortcut=C stem=deep' (default: none). May be given more than once. Keys: "
        f"{', '.join(NETWORK_FIELDS)}.",
    )


def overrides_of(arguments: argparse.Namespace) -> "Overrides":
    """What `--overrides` changes, checked."""
    from resnet_flax.models.registry import settable

    return settable(" ".join(arguments.overrides), "--overrides")


def open_model(arguments: argparse.Namespace, **settings: Any) -> "Pretrained":
    """The network with weights that MODEL and its flags name; see `load` for `settings`."""
    from resnet_flax.weights.loading import load

    return load(
        arguments.model_name,
        variant=arguments.model,
        weights=arguments.weights,
        overrides=overrides_of(arguments),
        **settings,
    )

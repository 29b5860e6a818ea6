"""`resnet-flax summary NAME`: one network as the paper's table 1 shows it."""

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnet_flax.cli import model_flags
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import INT32, whole_number
from resnet_flax.errors import UserError, closest
from resnet_flax.runtime import storage

if TYPE_CHECKING:
    from resnet_flax.models import ResNet
    from resnet_flax.models.variants import Overrides


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Show one network layer by layer: the kernel (height x width x input channels x output "
        "channels), the output for one image (height x width x channels), how many layers in a "
        "row are like this one, and the multiply-adds of all of these in millions (MMAC).",
        "%(prog)s resnet50",
        "%(prog)s cifar_resnet20 --classes=100",
        "%(prog)s resnet18 --overrides='shortcut=C stem=deep' --size=160",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="The name of a network, or of published weights; resnet-flax models lists them.",
    )
    parser.add_argument(
        "--size",
        type=whole_number(1, INT32),
        metavar="PIXELS",
        help="The side of the image (default: 224, or 32 for networks for CIFAR).",
    )
    parser.add_argument(
        "--classes",
        type=whole_number(0, INT32),
        metavar="N",
        help="The number of classes; 0 leaves out the head (default: 1000, or 10 for networks for "
        "CIFAR).",
    )
    model_flags.add_overrides(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the network; returns the exit status."""
    from resnet_flax.models.summary import native_size, summarize

    overrides = model_flags.overrides_of(arguments)
    if arguments.classes is not None:
        overrides["num_classes"] = arguments.classes
    model = _network(arguments.name, overrides)
    side = arguments.size or native_size(model)
    summary = summarize(model, (side, side, 3))
    rows = [("layer", "kernel hxwxinxout", "output hxwxc", "times", "MMAC")]
    # Decimals are left out where they would not fit into 80 columns.
    decimals = 2 if max(layer.multiply_adds for layer in summary.layers) < 1e11 else 0
    for layer in summary.layers:
        millions = f"{layer.multiply_adds / 1e6:.{decimals}f}"
        shapes = (_by(layer.kernel), _by(layer.output))
        rows.append((layer.path, *shapes, str(layer.times), millions))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [f"{text:{width}}" for text, width in zip(row[:3], widths[:3], strict=True)]
        right = [f"{text:>{width}}" for text, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join([*left, *right]))
    name = " ".join([arguments.name, *" ".join(arguments.overrides).split()])
    maps = ", ".join(f"{k} {_by(v)}" for k, v in summary.features.items())
    for text in (
        f"{name}: {summary.depth} layers, {summary.parameters:,} parameters, "
        f"{summary.multiply_adds / 1e9:.3f} GMAC at {side} x {side}",
        f"feature maps after the stages: {maps}",
    ):
        print(textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False))
    return 0


def _network(name: str, overrides: "Overrides") -> "ResNet":
    """The network of that name, or of published weights of that name."""
    from resnet_flax.models import VARIANTS, create_model
    from resnet_flax.weights.catalog import CATALOG

    if name in CATALOG:
        published = CATALOG[name]
        attributes = {"num_classes": published.classes, **dict(published.axes), **overrides}
        return create_model(published.variant, **attributes)
    if name not in VARIANTS and storage.exists(storage.local(name)):
        raise UserError(
            f"summary needs the name of a network, such as resnet50, not {name}, a file or "
            "directory; resnet-flax models lists the names"
        )
    if name not in VARIANTS:
        near = closest(name, [*CATALOG, *VARIANTS]) or "; resnet-flax models lists them"
        raise UserError(f"there is no model called {name!r}{near}")
    return create_model(name, **overrides)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))

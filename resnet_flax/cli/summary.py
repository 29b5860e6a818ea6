"""`resnet-flax summary NAME`: one network as the paper's table 1 shows it."""

import argparse

from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import INT32, whole_number


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Show one network layer by layer: the kernel, the output for one image, how many times the "
        "layer is used, and its multiply-adds in millions (MMAC).",
        "%(prog)s resnet50",
        "%(prog)s cifar_resnet20 --classes=100",
        "%(prog)s resnet18 --overrides='shortcut=C stem=deep' --size=160",
    )
    parser.add_argument(
        "name", metavar="NAME", help="The name of a network; resnet-flax models lists them."
    )
    parser.add_argument(
        "--size",
        type=whole_number(1, INT32),
        metavar="PIXELS",
        help="The side of the image (default: 224, or 32 for networks for CIFAR).",
    )
    parser.add_argument(
        "--classes",
        type=whole_number(1, INT32),
        metavar="N",
        help="The number of classes (default: 1000, or 10 for networks for CIFAR).",
    )
    parser.add_argument(
        *("--overrides", "--axes"),
        dest="overrides",
        default="",
        metavar="KEY=VALUE...",
        help="Changes to the network, fields of resnet_flax.ResNet with spaces between them "
        "(default: none).",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the network; returns the exit status."""
    from resnet_flax.models import create_model, parse_overrides
    from resnet_flax.models.summary import native_size, summarize

    overrides = parse_overrides(arguments.overrides)
    if arguments.classes:
        overrides["num_classes"] = arguments.classes
    model = create_model(arguments.name, **overrides)
    side = arguments.size or native_size(model)
    summary = summarize(model, (side, side, 3))
    print(f"{'layer':32} {'kernel':16} {'output':14} {'x':>4} {'MMAC':>9}")
    for layer in summary.layers:
        kernel = " x ".join(map(str, layer.kernel))
        output = " x ".join(map(str, layer.output))
        millions = f"{layer.multiply_adds / 1e6:.2f}"
        print(f"{layer.path:32} {kernel:16} {output:14} {layer.times:4} {millions:>9}")
    name = " ".join([arguments.name, *arguments.overrides.split()])
    maps = ", ".join(f"{k} {' x '.join(map(str, v))}" for k, v in summary.features.items())
    print(
        f"{name}: {summary.depth} layers, {summary.parameters:,} parameters, "
        f"{summary.multiply_adds / 1e9:.3f} GMAC at {side} x {side}\nmaps: {maps}"
    )
    return 0

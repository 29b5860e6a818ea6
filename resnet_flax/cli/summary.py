"""`resnet-flax summary NAME`: one network as the paper's table 1 shows it."""

from collections.abc import Sequence

from resnet_flax.cli import Parser
from resnet_flax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Prints the network; returns the exit status."""
    parser = Parser("summary", "Show a network layer by layer, for one image.")
    parser.add_argument("name", help="a variant, see resnet-flax models")
    parser.add_argument(
        "--size", type=int, default=0, help="side of the image (default: 224, or 32 for CIFAR nets)"
    )
    parser.add_argument("--classes", type=int, default=0, help="(default: 1000, or 10)")
    parser.add_argument("--axes", default="", help="changes: 'shortcut=C stem=deep se_ratio=16'")
    arguments = parser.parse_args(argv)
    for flag, value in (("--size", arguments.size), ("--classes", arguments.classes)):
        if not 0 <= value < 2**31:
            raise UserError(f"{flag} takes a number more than 0 and less than 2**31, not {value}")

    from resnet_flax.models import create_model, parse_axes
    from resnet_flax.models.summary import native_size, summarize

    axes = parse_axes(arguments.axes)
    if arguments.classes:
        axes["num_classes"] = arguments.classes
    model = create_model(arguments.name, **axes)
    side = arguments.size or native_size(model)
    summary = summarize(model, (side, side, 3))
    print(f"{'layer':32} {'kernel':16} {'output':14} {'x':>4} {'MMAC':>9}")
    for layer in summary.layers:
        kernel = " x ".join(map(str, layer.kernel))
        output = " x ".join(map(str, layer.output))
        millions = f"{layer.multiply_adds / 1e6:.2f}"
        print(f"{layer.path:32} {kernel:16} {output:14} {layer.times:4} {millions:>9}")
    name = " ".join([arguments.name, *arguments.axes.split()])
    maps = ", ".join(f"{k} {' x '.join(map(str, v))}" for k, v in summary.features.items())
    print(
        f"{name}: {summary.depth} layers, {summary.parameters:,} parameters, "
        f"{summary.multiply_adds / 1e9:.3f} GMAC at {side} x {side}\nmaps: {maps}"
    )
    return 0

"""`resnet-flax models`: the table of variants."""

import argparse

from resnet_flax.cli.parser import Parser
from resnet_flax.errors import UserError, closest


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "List the networks that have names, with their parameters, their multiply-adds for one "
        "image in billions (GMAC), their layers with weights, and the side of the image in pixels.",
        "%(prog)s",
        "%(prog)s resnet50",
    )
    parser.add_argument(
        "containing",
        nargs="?",
        default="",
        metavar="TEXT",
        help="List only the names that contain this text (default: all).",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each variant; returns the exit status."""
    from resnet_flax.models import VARIANTS, create_model
    from resnet_flax.models.summary import native_size, summarize

    wanted = arguments.containing
    names = [name for name in VARIANTS if wanted in name]
    if not names:
        raise UserError(f"no model's name contains {wanted!r}{closest(wanted, VARIANTS)}")
    print(f"{'name':20} {'parameters':>12} {'GMAC':>8} {'layers':>7} {'image':>6}")
    for name in names:
        model = create_model(name)
        side = native_size(model)
        summary = summarize(model, (side, side, 3))
        gmac = f"{summary.multiply_adds / 1e9:.3f}"
        print(
            f"{name:20} {summary.parameters:12,} {gmac:>8} {summary.depth:7} {side:6}", flush=True
        )
    return 0

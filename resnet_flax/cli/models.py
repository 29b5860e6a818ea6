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
        "%(prog)s resnet50 --published",
    )
    parser.add_argument(
        "containing",
        nargs="?",
        default="",
        metavar="TEXT",
        help="List only the names that contain this text (default: all).",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="List the names of published weights instead, with their number of classes, the side "
        "of their images in pixels (0 for images as they are), and where they come from.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each variant, or for all published weights; returns the exit status."""
    if arguments.published:
        return _list_published(arguments.containing)
    from resnet_flax.models import VARIANTS
    from resnet_flax.models.counts import count, stored

    wanted = arguments.containing
    names = [name for name in VARIANTS if wanted in name]
    if not names:
        raise UserError(f"no model's name contains {wanted!r}{closest(wanted, VARIANTS)}")
    print(f"{'name':20} {'parameters':>12} {'GMAC':>8} {'layers':>7} {'image':>6}")
    known = stored()
    for name in names:  # one that is not known was added to VARIANTS by the user
        row = known.get(name) or count(name)
        gmac = f"{row.multiply_adds / 1e9:.3f}"
        print(f"{name:20} {row.parameters:12,} {gmac:>8} {row.layers:7} {row.image:6}", flush=True)
    return 0


def _list_published(wanted: str) -> int:
    from urllib.parse import urlsplit

    from resnet_flax.weights.catalog import CATALOG

    names = [name for name in CATALOG if wanted in name]
    if not names:
        raise UserError(f"no published weights' name contains {wanted!r}{closest(wanted, CATALOG)}")
    print(f"{'name':40} {'classes':>7} {'image':>6}  from")
    for name in names:
        published = CATALOG[name]
        by_hand = "" if published.repository or published.sha256 else ", by hand"
        host = urlsplit(published.address).hostname
        side = published.images["size"]
        print(f"{name:40} {published.classes:7} {side:6}  {host}{by_hand}")
    return 0

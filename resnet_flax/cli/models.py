"""`resnet-flax models`: the table of variants."""

from collections.abc import Sequence

from resnet_flax.cli import Parser


def main(argv: Sequence[str]) -> int:
    """Prints a line for each variant; returns the exit status."""
    parser = Parser("models", "List the networks that have names.")
    parser.add_argument("containing", nargs="?", default="", help="only names that contain this")
    wanted = parser.parse_args(argv).containing

    from resnet_flax.errors import UserError, closest
    from resnet_flax.models import VARIANTS, create_model
    from resnet_flax.models.summary import native_size, summarize

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

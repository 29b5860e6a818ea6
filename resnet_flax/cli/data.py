"""`resnet-flax data check|prepare SOURCE`: what a data set holds, and how one is made ready."""

from collections.abc import Sequence

from resnet_flax.cli import Parser
from resnet_flax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Checks or prepares a data set; returns the exit status."""
    parser = Parser(
        "data",
        "check: splits, classes and number of images; with --all every image is decoded.\n"
        "prepare: download a TFDS set and write it in the form that is read here.",
    )
    parser.add_argument("what", choices=("check", "prepare"))
    parser.add_argument("source", help="tfds:NAME or folder:DIR")
    parser.add_argument("--data_dir", default="", help="of TFDS (default: its own)")
    parser.add_argument("--all", action="store_true", help="decode every image")
    arguments = parser.parse_args(argv)

    from resnet_flax.data.sources import open_source, splits_of
    from resnet_flax.data.tfds_source import prepare

    if arguments.what == "prepare":
        kind, _, name = arguments.source.partition(":")
        if kind != "tfds" or not name:
            raise UserError(f"only tfds:NAME can be prepared, not {arguments.source!r}")
        print(f"prepared in {prepare(name, arguments.data_dir)}")
    bad = 0
    splits = splits_of(arguments.source, arguments.data_dir)
    if not splits:
        raise UserError(f"{arguments.source} has no directory for a split, such as train or val")
    for split in splits:
        source = open_source(arguments.source, split, arguments.data_dir)
        names = ", ".join(source.class_names[:5]) + ", ..." * (len(source.class_names) > 5)
        print(f"{split}: {len(source):,} images, {len(source.class_names)} classes ({names})")
        for index in range(len(source) if arguments.all else min(1, len(source))):
            try:
                source[index]
            except UserError as error:
                print(f"  {error}")
                bad += 1
    if bad:
        raise UserError(f"{bad} image{'s' * (bad > 1)} of {arguments.source} cannot be decoded")
    return 0

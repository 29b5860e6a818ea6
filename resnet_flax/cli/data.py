"""`resnet-flax data check|prepare SOURCE`: what is in a data set, and how one is prepared."""

import argparse

from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import data_source, tfds_source
from resnet_flax.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the two actions."""
    parser.describe(
        "Check or prepare a data set.",
        "%(prog)s prepare tfds:cifar10",
        "%(prog)s check folder:/data/imagenet --all",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    check = actions.add_parser("check", help="Print the splits, images and classes of a data set.")
    check.describe(
        "Print the splits, images and classes of a data set, and decode some of its images.",
        "%(prog)s tfds:digits",
        "%(prog)s folder:/data/imagenet --all",
    )
    check.add_argument(
        "source",
        type=data_source,
        metavar="SOURCE",
        help="The data set: tfds:NAME, already prepared, or folder:DIR with images in "
        "DIR/SPLIT/CLASS.",
    )
    prepare = actions.add_parser("prepare", help="Download a data set of TFDS and prepare it.")
    prepare.describe(
        "Download a data set of TensorFlow Datasets (TFDS), write it in the form that this "
        "package reads, and check it.",
        "%(prog)s tfds:cifar10",
    )
    prepare.add_argument(
        "source", type=tfds_source, metavar="SOURCE", help="The data set, as tfds:NAME."
    )
    for action, function in ((check, _check), (prepare, _prepare)):
        action.add_argument(
            "--data_dir",
            default="",
            metavar="DIR",
            help="Directory with TensorFlow Datasets (TFDS) data, created if needed (default: "
            "TFDS_DATA_DIR, or ~/tensorflow_datasets).",
        )
        action.add_argument(
            "--all",
            action="store_true",
            help="Decode every image, not only the first one of each split.",
        )
        action.set_defaults(run=function)


def _prepare(arguments: argparse.Namespace) -> int:
    from resnet_flax.data.sources.tfds import prepare
    from resnet_flax.runtime import distributed

    distributed.refuse_several("data prepare")
    name = arguments.source.removeprefix("tfds:")
    print(f"prepared in {prepare(name, arguments.data_dir)}")
    return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from resnet_flax.data.sources import open_source, splits_of

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

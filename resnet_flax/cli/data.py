"""`resnet-flax data check|prepare SOURCE`: what is in a data set, and how one is prepared."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import data_source, tfds_source
from resnet_flax.cli.words import WORDS, told
from resnet_flax.errors import UserError

if TYPE_CHECKING:
    from resnet_flax.data.sources import FolderSource


def add_arguments(parser: Parser) -> None:
    """Adds the two actions."""
    parser.describe(
        "Check or prepare a data set.",
        "%(prog)s prepare tfds:cifar10",
        "%(prog)s check folder:/data/imagenet --all",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    check, prepare = _add_check(actions), _add_prepare(actions)
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


def _add_check(actions: Any) -> Parser:
    check = actions.add_parser("check", help="Print the splits, images and classes of a data set.")
    check.describe(
        "Print the splits, images and classes of a data set, and decode some of its images. Of a "
        "folder, also print which files are left out and why, and whether torchvision's "
        "ImageFolder would read others.",
        "%(prog)s tfds:digits",
        "%(prog)s folder:/data/imagenet --split=val --all",
    )
    check.add_argument(
        "source",
        type=data_source,
        metavar="SOURCE",
        help="The data set: tfds:NAME, already prepared, or folder:DIR with images in "
        "DIR/SPLIT/CLASS.",
    )
    check.add_argument(
        "--split",
        default="",
        metavar="SPLIT",
        help="The split to check, which may be a slice of one of TFDS, such as train[:10%%] "
        "(default: every split).",
    )
    return check


def _add_prepare(actions: Any) -> Parser:
    prepare = actions.add_parser("prepare", help="Download a data set of TFDS and prepare it.")
    prepare.describe(
        "Download a data set of TensorFlow Datasets (TFDS), write it in the form that this "
        "package reads, and check it.",
        "%(prog)s tfds:cifar10",
    )
    prepare.add_argument(
        "source", type=tfds_source, metavar="SOURCE", help="The data set, as tfds:NAME."
    )
    prepare.set_defaults(split="")
    return prepare


def _prepare(arguments: argparse.Namespace) -> int:
    from resnet_flax.data.sources.tfds import prepare
    from resnet_flax.runtime import distributed

    distributed.refuse_several("data prepare")
    name = arguments.source.removeprefix("tfds:")
    print(f"prepared in {prepare(name, arguments.data_dir)}")
    return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from resnet_flax.data.sources import splits_of

    name, asked = arguments.source, arguments.split
    splits = [asked] if asked else splits_of(name, arguments.data_dir)
    problems: dict[str, None] = {}  # in order, as several splits may have the same
    bad = 0
    for split in splits:
        try:
            bad += _check_split(name, split, arguments.data_dir, every=arguments.all)
        except UserError as error:
            problems[told(error, WORDS["data"])] = None
    if not asked and name.startswith("folder:"):
        _print_beside(name.removeprefix("folder:"), splits)
    if bad:
        problems[f"{bad} image{'s' * (bad > 1)} of {name} cannot be decoded"] = None
    if problems:
        raise UserError("; ".join(problems))
    return 0


def _check_split(name: str, split: str, data_dir: str, *, every: bool) -> int:
    """Prints what is in a split; returns how many of its images cannot be decoded."""
    from resnet_flax.data.sources import FolderSource, open_source
    from resnet_flax.data.sources.parts import example_of, label_of

    source = open_source(name, split, data_dir)
    names = ", ".join(source.class_names[:5]) + ", ..." * (len(source.class_names) > 5)
    print(f"{split}: {len(source):,} images, {len(source.class_names)} classes ({names})")
    if isinstance(source, FolderSource):
        _print_left_out(source)
    bad = 0
    for index in range(len(source) if every else 1):
        try:
            label_of(example_of(source, index), len(source.class_names))
        except UserError as error:
            print(f"  {told(error, WORDS['data'])}")
            bad += 1
    return bad


def _print_left_out(source: "FolderSource") -> None:
    from resnet_flax.data.sources.image_files import count, some

    for reason, files in source.left_out().items():
        print(f"  left out: {count(files)} {reason}: {some(files)}")
    difference = source.torchvision_view()
    if difference:
        print(f"  torchvision's ImageFolder {difference}")


def _print_beside(where: str, splits: Sequence[str]) -> None:
    from resnet_flax.data.sources.image_files import beside_splits, some
    from resnet_flax.runtime import storage

    beside = beside_splits(storage.local(where), splits)
    if beside:
        print(f"beside the splits, left out: {some(beside)}")

"""The flags of `resnet-flax eval`."""

import argparse

from resnet_flax.cli import model_flags, processes
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import (
    channel_numbers,
    data_source,
    names_file,
    number,
    output_file,
    whole_number,
    whole_numbers,
)

SPLITS = ("test", "val", "validation")
# Repeated here, as the modules that define them import JAX or Pillow, which help pages do not need.
PROTOCOLS = ("center", "ten_crop", "multiscale")
INTERPOLATIONS = ("bilinear", "bicubic")
EXIF, ALPHA, CHANNELS = ("off", "on"), ("drop", "white", "error"), (1, 3, 4)
DTYPES = ("float32", "bfloat16")
# Flags of fields of `Preprocessing`.
PREPROCESSING = (
    *("size", "crop_fraction", "interpolation", "mean", "std"),
    *("exif", "alpha", "channels"),
)


def add(parser: Parser) -> None:
    """Adds them all."""
    _add_network(parser)
    _add_data(parser)
    _add_protocol(parser)
    _add_preprocessing(parser)
    _add_output(parser)
    processes.add_flags(parser)


def _add_network(parser: Parser) -> None:
    group = model_flags.add_model(parser)
    group.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="MODEL",
        help="Another model, whose probabilities are averaged with those of the first. May be "
        "given more than once.",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="The dtype of the computation (default: float32, or that of the run).",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=data_source,
        metavar="SOURCE",
        help="The data set, as tfds:NAME or folder:DIR (default: that of the run).",
    )
    group.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="Directory with TensorFlow Datasets (TFDS) data, created if needed (default: that of "
        "the run, TFDS_DATA_DIR, or ~/tensorflow_datasets).",
    )
    group.add_argument(
        "--split",
        default="",
        metavar="SPLIT",
        help="The split, such as test or test[:1000] (default: that of the run, or the first of "
        f"{', '.join(SPLITS)} that the data set has).",
    )
    _add_matching(group)
    group.add_argument(
        "--batch_size",
        type=whole_number(1, 2**20),
        default=100,
        metavar="N",
        help="Images in a batch; the results do not depend on it (default: %(default)s).",
    )
    group.add_argument(
        "--workers",
        type=whole_number(0, 1024),
        default=0,
        metavar="N",
        help="Processes that read images; 0 reads in threads (default: %(default)s).",
    )


def _add_matching(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--by_number",
        action="store_true",
        help="Match the classes of the data and of the network by number, not by name, and print "
        "the pairs. The number of a class is its name where all names are numbers, otherwise its "
        "position. A class with the name of another output is refused.",
    )
    group.add_argument(
        "--class_names",
        type=names_file,
        default=(),
        metavar="FILE",
        help="A text file with the names of the network's outputs in their order, one a line, as "
        "the data calls them (default: those in the weights; without any, classes are matched by "
        "number).",
    )


def _add_protocol(parser: Parser) -> None:
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="center",
        help="The views of each image whose probabilities are averaged: center is one crop; "
        "ten_crop is the center and corners with their mirror images; multiscale is complete "
        "images at several scales with their mirror images, to which the network is applied as a "
        "convolution (default: %(default)s).",
    )
    group.add_argument(
        "--scales",
        type=whole_numbers(1, 2**14, "224,256,384"),
        default=[],
        metavar="N,N,...",
        help="The shorter sides of the images of multiscale in pixels (default: "
        "224,256,384,480,640, in proportion where the network's side is not 224).",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="In multiscale, do not crop longer sides to a multiple of the network's stride; "
        "a program is compiled for every image shape.",
    )


def _add_preprocessing(parser: Parser) -> None:
    group = parser.add_argument_group(
        "preprocessing",
        "The defaults are those of the run, the file of weights or the catalog.",
    )
    group.add_argument(
        "--size",
        type=whole_number(0, 2**14),
        metavar="PIXELS",
        help="The side of the crop; 0 uses images as they are.",
    )
    group.add_argument(
        "--crop_fraction",
        type=number(0.05, 1.0),
        metavar="FRACTION",
        help="The side of the crop as a fraction of the resized shorter side.",
    )
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="The filter of resizing.")
    group.add_argument(
        "--mean",
        type=channel_numbers("0.485,0.456,0.406"),
        metavar="X[,X,X]",
        help="The mean that is subtracted from pixels in [0, 1]: one number, or one for each "
        "channel, such as 0.485,0.456,0.406.",
    )
    group.add_argument(
        "--std",
        type=channel_numbers("0.229,0.224,0.225", zero=False),
        metavar="X[,X,X]",
        help="The standard deviation by which pixels are then divided, in the same form.",
    )
    group.add_argument(
        "--exif",
        choices=EXIF,
        help="Whether images are turned upright as their EXIF orientation says; published figures "
        "are without.",
    )
    group.add_argument(
        "--alpha",
        choices=ALPHA,
        help="What becomes of transparent pixels: white shows them on white, drop ignores the "
        "alpha channel, as published figures do, and error refuses the image.",
    )
    group.add_argument(
        "--channels",
        type=int,
        choices=CHANNELS,
        help="The channels that images are converted to: 1 (grey), 3 (RGB) or 4 (RGB and alpha).",
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--per_class",
        action="store_true",
        help="Print every class, even if there are more than 20.",
    )
    group.add_argument(
        "--out",
        type=output_file(".json"),
        metavar="FILE.json",
        help="A file for the results; its directory is created if needed (default: they are only "
        "printed).",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Further metrics: balanced_error, the mean over classes of the top-1 error "
        "(default: none).",
    )
    group.add_argument(
        "--confusion",
        type=output_file(".csv"),
        metavar="FILE.csv",
        help="A file for the confusion matrix, one row for each label and one column for each "
        "prediction; its directory is created if needed (default: it is not counted).",
    )

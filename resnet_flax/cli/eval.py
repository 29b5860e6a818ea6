"""`resnet-flax eval MODEL`: exact error rates of a network with weights."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resnet_flax.cli.parser import Parser, either
from resnet_flax.cli.types import (
    channel_numbers,
    data_source,
    number,
    output_file,
    whole_number,
    whole_numbers,
)
from resnet_flax.errors import UserError

if TYPE_CHECKING:
    from resnet_flax.data.preprocessing import Preprocessing
    from resnet_flax.evaluation.protocols import Network

SPLITS = ("test", "val", "validation")
# Written here since the modules that define them import JAX or Pillow, which no help page needs.
PROTOCOLS = ("center", "ten_crop", "multiscale")
INTERPOLATIONS = ("bilinear", "bicubic")
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Evaluate a network with weights on a data set: error rates with their 95 % intervals, "
        "over all classes and for each. Every image counts once.",
        "%(prog)s runs/digits_resnet20",
        "%(prog)s resnet50.a1_in1k --data=folder:/data/imagenet --out=a1.json",
        "%(prog)s cifar_resnet20 --weights=resnet20.th --data=tfds:cifar10",
    )
    _add_network(parser)
    _add_data(parser)
    _add_protocol(parser)
    _add_preprocessing(parser)
    _add_output(parser)
    parser.set_defaults(run=run)


def _add_network(parser: Parser) -> None:
    parser.add_argument(
        "model_name",
        metavar="MODEL",
        help="The workdir of a run, the name of published weights, a file of weights, or the name "
        "of a network whose weights --weights gives.",
    )
    group = parser.add_argument_group("network")
    group.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="A file of weights, or the name of published ones, where MODEL is the name of a "
        "network.",
    )
    group.add_argument(
        "--model",
        default="",
        metavar="VARIANT",
        help="The network of a file of weights, needed where the shapes of the weights fit more "
        "than one.",
    )
    group.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="MODEL",
        help="A further model, whose probabilities are averaged with those of the first. May be "
        "given more than once.",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="The type of the computation (default: float32, or that of the run).",
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
        help="The directory of TFDS (default: that of the run, TFDS_DATA_DIR, or "
        "~/tensorflow_datasets).",
    )
    group.add_argument(
        "--split",
        default="",
        metavar="SPLIT",
        help="The split, such as test or test[:1000] (default: that of the run, or the first of "
        f"{', '.join(SPLITS)} that the data set has).",
    )
    group.add_argument(
        "--by_number",
        action="store_true",
        help="Match the classes of the data and of the network by number, not by name.",
    )
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


def _add_protocol(parser: Parser) -> None:
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="center",
        help="The views of each image, over which probabilities are averaged: center is one crop; "
        "ten_crop is center and corners with their mirror images; multiscale is whole images at "
        "several scales with their mirror images, to which the network is applied as a convolution "
        "(default: %(default)s).",
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
        help="Do not crop the longer sides of multiscale to a multiple of the network's stride; "
        "every shape of image is compiled.",
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
        help="The side of the crop; 0 takes images as they are.",
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


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--per_class",
        action="store_true",
        help="Print every class, also where there are more than 20.",
    )
    group.add_argument(
        "--out",
        type=output_file(),
        metavar="FILE.json",
        help="A file for the results (default: they are only printed).",
    )
    group.add_argument(
        "--confusion",
        type=output_file(),
        metavar="FILE.csv",
        help="A file for the confusion matrix: a row for each label, a column for each prediction "
        "(default: it is not counted).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluates; returns the exit status."""
    if (arguments.scales or arguments.exact) and arguments.protocol != "multiscale":
        raise UserError("--scales and --exact need --protocol=multiscale")
    from resnet_flax.cli import eval_report
    from resnet_flax.evaluation.pretrained import evaluate_pretrained, report
    from resnet_flax.runtime import compilation_cache
    from resnet_flax.runtime.progress import Progress

    compilation_cache.enable()
    models = _open_models(arguments)
    data, data_dir, split = _data(arguments, models[0].config)
    names = next((one.class_names for one in models if one.class_names), ())
    networks = _networks(arguments, models, names)
    source = _source(arguments, (data, split, data_dir), names, models[0].model.num_classes)
    names = names or source.class_names
    print("\n".join(one.origin for one in models))
    print(
        f"on {data}, {split} ({len(source):,} images), {arguments.protocol}: "
        f"{eval_report.describe(networks[0].preprocessing, models[0].assumed)}",
        flush=True,
    )
    with Progress() as progress:
        result = evaluate_pretrained(
            networks,
            source,
            protocol=arguments.protocol,
            scales=arguments.scales,
            exact=arguments.exact,
            confusion=arguments.confusion is not None,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=progress.add("eval").update,
        )
    reported = report(result, names)
    eval_report.show(reported, every=arguments.per_class)
    if arguments.out:
        what = {"data": data, "split": split, "protocol": arguments.protocol}
        if arguments.protocol == "multiscale":
            what |= {"scales": arguments.scales or "default", "exact": arguments.exact}
        eval_report.write(arguments.out, what, models, networks, reported)
    if arguments.confusion:
        eval_report.write_confusion(arguments.confusion, result.confusion, names)
    return 0


def _open_models(arguments: argparse.Namespace) -> list[Any]:
    """The model and the further ones of the ensemble."""
    from resnet_flax.weights.loading import open_pretrained

    dtype = arguments.dtype
    first = open_pretrained(
        arguments.model_name, variant=arguments.model, weights=arguments.weights, dtype=dtype
    )
    return [first, *(open_pretrained(name, dtype=dtype) for name in arguments.ensemble)]


def _data(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[str, str, str]:
    """The data set, its directory and its split; those of the run where none are given."""
    data = arguments.data or config.get("data.source", "")
    if not data:
        raise UserError(
            f"{arguments.model_name} names no data; pass --data=tfds:NAME or --data=folder:DIR"
        )
    data_dir = arguments.data_dir or config.get("data.data_dir", "")
    return data, data_dir, arguments.split or _split(data, data_dir, arguments.data, config)


def _split(data: str, data_dir: str, asked: str | None, config: Mapping[str, Any]) -> str:
    if not asked and "data.eval_split" in config and config["data.eval_split"] != "holdout":
        return str(config["data.eval_split"])
    from resnet_flax.data.sources import splits_of

    splits = splits_of(data, data_dir)
    for split in SPLITS:
        if split in splits:
            return split
    raise UserError(f"{data} has no split {either(SPLITS)}; pass --split=SPLIT")


def _source(
    arguments: argparse.Namespace, where: tuple[str, str, str], names: tuple[str, ...], outputs: int
) -> Any:
    from resnet_flax.data.sources import open_source
    from resnet_flax.evaluation.labels import as_outputs

    return as_outputs(open_source(*where), names, outputs, by_number=arguments.by_number)


def _networks(
    arguments: argparse.Namespace, models: Sequence[Any], names: Sequence[str]
) -> "list[Network]":
    """The models with the preprocessing of each.

    Raises:
      UserError: their classes are not the same, or nothing tells how images are normalized.
    """
    from resnet_flax.data.preprocessing import Preprocessing
    from resnet_flax.evaluation.protocols import Network

    networks = []
    for one in models:
        if one.preprocessing is None and not (arguments.mean and arguments.std):
            raise UserError(
                f"nothing tells how the images for {one.origin} are normalized; pass --mean and "
                "--std, of pixels in [0, 1]"
            )
        _check_same_classes(models[0], one, names)
        preprocessing = _preprocessing(arguments, one.preprocessing or Preprocessing(size=0))
        networks.append(Network(one.model, one.variables, preprocessing))
    return networks


def _check_same_classes(first: Any, other: Any, names: Sequence[str]) -> None:
    same = first.model.num_classes == other.model.num_classes
    if other.class_names:
        same = same and other.class_names == names
    if not same:
        raise UserError(
            f"{first.origin} and {other.origin} have different classes; give an ensemble of "
            "networks with the same classes in the same order"
        )


def _preprocessing(arguments: argparse.Namespace, default: "Preprocessing") -> "Preprocessing":
    given = {
        name: getattr(arguments, name)
        for name in ("size", "crop_fraction", "interpolation", "mean", "std")
        if getattr(arguments, name) is not None
    }
    if "mean" in given:
        given["pixel_mean"] = ()  # which it is instead of
    return replace(default, **given)

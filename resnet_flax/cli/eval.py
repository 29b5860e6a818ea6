"""`resnet-flax eval MODEL`: exact error rates of a network with weights."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from resnet_flax.cli import eval_flags
from resnet_flax.cli.parser import Parser, either
from resnet_flax.errors import UserError

if TYPE_CHECKING:
    from resnet_flax.data.preprocessing import Preprocessing
    from resnet_flax.evaluation.multi_view import Network


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Evaluate a network with weights on a data set: error rates with their 95 % intervals, "
        "over all classes and for each. Every image counts once.",
        "%(prog)s runs/digits_resnet20",
        "%(prog)s resnet50.a1_in1k --data=folder:/data/imagenet --out=a1.json",
        "%(prog)s cifar_resnet20 --weights=resnet20.th --data=tfds:cifar10",
    )
    eval_flags.add(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates; returns the exit status."""
    for flag in ("scales", "exact"):
        if getattr(arguments, flag) and arguments.protocol != "multiscale":
            raise UserError(f"--{flag} needs --protocol=multiscale")
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
        f"{eval_report.describe_views(arguments, networks[0], source, models[0].assumed)}",
        flush=True,
    )
    with Progress() as progress:
        bar = progress.add("eval", len(source), text="compiling")
        result = evaluate_pretrained(
            networks,
            source,
            protocol=arguments.protocol,
            scales=arguments.scales,
            exact=arguments.exact,
            confusion=arguments.confusion is not None,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=partial(bar.update, text=""),
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
    from resnet_flax.weights.loading import load

    dtype = arguments.dtype
    first = load(
        arguments.model_name, variant=arguments.model, weights=arguments.weights, dtype=dtype
    )
    return [first, *(load(name, dtype=dtype) for name in arguments.ensemble)]


def _data(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[str, str, str]:
    """The data set, its directory and its split; by default those of the run."""
    data = arguments.data or config.get("data.source", "")
    if not data:
        raise UserError(
            f"{arguments.model_name} has no data set of its own; pass --data=tfds:NAME or "
            "--data=folder:DIR"
        )
    data_dir = arguments.data_dir or config.get("data.data_dir", "")
    return data, data_dir, arguments.split or _split(data, data_dir, arguments.data, config)


def _split(data: str, data_dir: str, asked: str | None, config: Mapping[str, Any]) -> str:
    if not asked and "data.eval_split" in config and config["data.eval_split"] != "holdout":
        return str(config["data.eval_split"])
    from resnet_flax.data.sources import splits_of

    splits = splits_of(data, data_dir)
    for split in eval_flags.SPLITS:
        if split in splits:
            return split
    raise UserError(f"{data} has no split {either(eval_flags.SPLITS)}; pass --split=SPLIT")


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
      UserError: their classes differ, or it is unknown how images are normalized.
    """
    from resnet_flax.data.preprocessing import Preprocessing
    from resnet_flax.evaluation.multi_view import Network

    networks = []
    for one in models:
        if one.preprocessing is None and not (arguments.mean and arguments.std):
            raise UserError(
                f"it is unknown how images for {one.origin} are normalized; pass --mean and "
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

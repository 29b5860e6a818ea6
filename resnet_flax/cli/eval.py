"""`resnet-flax eval MODEL`: exact error rates of a network with weights."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from resnet_flax.cli import eval_flags, model_flags, processes
from resnet_flax.cli.eval_data import open_eval_data
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.stoppable import heard
from resnet_flax.cli.words import ENSEMBLE
from resnet_flax.errors import SettingError, UserError

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
    heartbeat = processes.start(arguments)
    if heartbeat is not None:
        heartbeat.again = "start the same command in all processes again"
    with heard(heartbeat):
        _evaluate(arguments)
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    """Evaluates, together with the other processes if there are any; the first one reports."""
    import jax

    from resnet_flax.cli import eval_report
    from resnet_flax.data.fingerprint import take
    from resnet_flax.data.sources.parts import example_of
    from resnet_flax.evaluation.labels import as_outputs
    from resnet_flax.evaluation.pretrained import evaluate_pretrained
    from resnet_flax.runtime import compilation_cache, distributed
    from resnet_flax.runtime.progress import Progress
    from resnet_flax.runtime.terminal import say

    compilation_cache.enable()
    with distributed.together("cannot open its model or its data"):
        models = _open_models(arguments)
        data = open_eval_data(arguments, models)
        own_names = next((one.class_names for one in models if one.class_names), ())
        networks = _networks(arguments, models, own_names)
        names = arguments.class_names or own_names
        outputs = models[0].model.num_classes
        by_number = arguments.by_number
        source = as_outputs(data.source, names, outputs, by_number=by_number, say=_say)
        example_of(source, 0)  # the processes agree on whether they could read the others
        fingerprint = take(source) if jax.process_count() > 1 else {}
        names = names or source.class_names
    if jax.process_count() > 1:
        _check_same_on_all(arguments, networks, fingerprint)
    if distributed.is_primary():
        views = eval_report.describe_views(arguments, networks[0], source, models[0].assumed)
        print("\n".join(one.origin for one in models))
        print(f"on {data.name}, {data.about}, {arguments.protocol}: {views}", flush=True)
    warnings: list[str] = []
    # A launcher may give processes a terminal though it writes to a file.
    with Progress(wanted=jax.process_count() == 1) as progress:
        bar = progress.add("eval", len(source), text="compiling")
        result = evaluate_pretrained(
            networks,
            source,
            protocol=arguments.protocol,
            scales=arguments.scales,
            exact=arguments.exact,
            confusion=arguments.confusion is not None,
            more=arguments.metrics,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=partial(bar.update, text=""),
            warn=warnings.append,
            flags="--",
        )
    for warning in warnings:
        say(warning, sys.stderr)
    if distributed.is_primary():
        _report(arguments, (data.name, data.split), models, networks, result, names)


def _report(
    arguments: argparse.Namespace,
    where: tuple[str, str],
    models: Sequence[Any],
    networks: "Sequence[Network]",
    result: Any,
    names: tuple[str, ...],
) -> None:
    """Writes and prints a result; `where` is the data set and its split."""
    from resnet_flax.cli import eval_report
    from resnet_flax.evaluation.pretrained import report

    reported = report(result, names)
    # Files first: a terminal that is gone would end the program before.
    if arguments.out:
        what = {"data": where[0], "split": where[1], "protocol": arguments.protocol}
        if arguments.protocol == "multiscale":
            what |= {"scales": arguments.scales or "default", "exact": arguments.exact}
        eval_report.write(arguments.out, what, models, networks, reported)
    if arguments.confusion:
        eval_report.write_confusion(arguments.confusion, result.confusion, names)
    eval_report.show(reported, every=arguments.per_class)


def _check_same_on_all(
    arguments: argparse.Namespace, networks: "Sequence[Network]", fingerprint: Mapping[str, Any]
) -> None:
    """Raises UserError in every process unless all evaluate the same in the same way."""
    from resnet_flax.runtime import distributed
    from resnet_flax.training.digests import digests

    # Hosts may have files in other places; what is in these is compared instead.
    places = ("model_name", "weights", "ensemble", "data", "data_dir", "out", "confusion")
    besides = (*places, *processes.FLAGS, "workers", "per_class", "run", "parser")
    flags = {name: value for name, value in vars(arguments).items() if name not in besides}
    flags["confusion"] = arguments.confusion is not None
    distributed.assert_same_on_all(flags, what="command", compare="its flags")
    models = {
        str(i): [repr(network.model), network.preprocessing.to_json(), digests(network.variables)]
        for i, network in enumerate(networks)
    }
    distributed.assert_same_on_all(models, what="model", compare="its files")
    distributed.assert_same_on_all(fingerprint, what="data set", compare="its files")


def _open_models(arguments: argparse.Namespace) -> list[Any]:
    """The model and the further ones of the ensemble."""
    from resnet_flax.weights.loading import load

    dtype = arguments.dtype
    first = model_flags.open_model(arguments, dtype=dtype)
    names, outputs = arguments.class_names, first.model.num_classes
    if names and len(names) != outputs:
        raise UserError(
            f"--class_names has {len(names)} names, but {first.origin} has {outputs} outputs; give "
            "a file with one name a line, in the order of the outputs"
        )
    models = [first]
    for name in arguments.ensemble:
        try:
            models.append(load(name, dtype=dtype))
        except SettingError as error:
            raise UserError(error.told(ENSEMBLE)) from error
    return models


def _say(text: str) -> None:
    """Prints a line, in the first process."""
    from resnet_flax.runtime import distributed

    if distributed.is_primary():
        print(text)


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
        if names and not one.class_names:
            _say(f"{one.origin} has no names of classes: its outputs are taken for the other's")
        preprocessing = _preprocessing(arguments, one.preprocessing or Preprocessing(size=0))
        networks.append(Network(one.model, one.variables, preprocessing))
    return networks


def _check_same_classes(first: Any, other: Any, names: Sequence[str]) -> None:
    from resnet_flax.data.class_names import same

    alike = first.model.num_classes == other.model.num_classes
    if other.class_names:
        alike = alike and same(other.class_names, names)
    if not alike:
        raise UserError(
            f"{first.origin} and {other.origin} have different classes; give an ensemble of "
            "networks with the same classes in the same order"
        )


def _preprocessing(arguments: argparse.Namespace, default: "Preprocessing") -> "Preprocessing":
    given = {
        name: getattr(arguments, name)
        for name in eval_flags.PREPROCESSING
        if getattr(arguments, name) is not None
    }
    if "mean" in given:
        given["pixel_mean"] = ()  # which it is instead of
    return replace(default, **given)

"""What `resnet-flax eval` prints and writes."""

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.data.sources import Source
from resnet_flax.evaluation.multi_view import Network, scales_of
from resnet_flax.runtime import storage
from resnet_flax.runtime.provenance import provenance


def describe_views(
    arguments: argparse.Namespace, network: Network, source: Source, assumed: bool
) -> str:
    """What a network sees of each image, in a few words.

    Args:
      arguments: of the protocol.
      network: the first one.
      source: the images.
      assumed: the file of weights did not tell the preprocessing.
    """
    scales: Sequence[int] = ()
    if arguments.protocol == "multiscale":
        shape = network.preprocessing.transform(source[0]["image"]).shape
        scales = arguments.scales or scales_of(network, shape)
    seen = describe(network.preprocessing, arguments.protocol, scales)
    return seen + " (assumed: the file does not say)" * assumed


def describe(preprocessing: Preprocessing, protocol: str, scales: Sequence[int] = ()) -> str:
    """The views of a protocol in a few words; `scales` are the shorter sides of 'multiscale'."""
    if protocol == "multiscale":
        sides = ", ".join(map(str, dict.fromkeys(scales)))
        return f"shorter sides {sides}, {preprocessing.interpolation}, with mirror images"
    if not preprocessing.size:
        return "images as they are"
    how = (
        f"of {preprocessing.size} from a shorter side of {preprocessing.transform.shorter}, "
        f"{preprocessing.interpolation}"
    )
    return f"crops {how}, with mirror images" if protocol == "ten_crop" else f"crop {how}"


def show(reported: Mapping[str, Any], *, every: bool) -> None:
    """Prints what `evaluation.pretrained.report` returns; `every` class, or only the worst ones."""
    print(f"{'':24} {'error':>9}  {'95 % interval':>18}")
    print(_line("top-1", reported["top1_error"]))
    print(_line("top-5", reported["top5_error"]))
    print(f"{'negative log likelihood':24} {reported['negative_log_likelihood']:7.4f}")
    print(f"{'calibration error':24} {100 * reported['calibration_error']:7.2f} %")
    for name, value in reported.get("metrics", {}).items():
        print(f"{name:24} {f'{value:7.4f}' if isinstance(value, float) else value}")
    classes = sorted(reported["classes"].items(), key=lambda item: -item[1]["rate"])
    few = classes if every or len(classes) <= 20 else classes[:5]
    for name, rate in few:
        print(_line(name, rate))
    if len(few) < len(classes):
        print(f"({len(classes) - len(few)} more classes; pass --per_class or --out to see them)")


def _line(name: str, rate: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in rate["interval"])
    return (
        f"{name:24.24} {100 * rate['rate']:7.2f} %  {low:6.2f} to {high:6.2f} %"
        f"  {rate['errors']:,} of {rate['count']:,}"
    )


def write(
    path: Path,
    what: Mapping[str, Any],
    models: Sequence[Any],
    networks: Sequence[Network],
    reported: Mapping[str, Any],
) -> None:
    """Writes the results as JSON.

    Args:
      path: of the file.
      what: what was evaluated, on which data and how.
      models: as they were opened, the first and the rest of an ensemble.
      networks: the same models, as they were evaluated.
      reported: the rates.
    """
    first, *others = [_used(*one) for one in zip(models, networks, strict=True)]
    ensemble = {"ensemble": others} if others else {}
    storage.write_json(path, {**what, **first, **ensemble, **reported, **provenance()})
    print(f"written to {path}")


def _used(found: Any, network: Network) -> dict[str, Any]:
    """What was evaluated, as JSON."""
    described = network.preprocessing.to_json()
    described["pixel_mean"] = bool(described["pixel_mean"])  # long, and in the checkpoint
    return {
        "model": found.origin,
        "weights_sha256": found.sha256,
        "preprocessing": described,
        "dtype": str(jnp.dtype(found.model.dtype)),
    }


def write_confusion(path: Path, matrix: Any, names: Sequence[str]) -> None:
    """Writes the confusion matrix as CSV, a row for each label and a column for each prediction."""
    names = names or [str(i) for i in range(len(matrix))]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", *names])
    writer.writerows([name, *row] for name, row in zip(names, matrix, strict=True))
    storage.write(path, text.getvalue())
    print(f"written to {path}: one row for each label, one column for each prediction")

"""`resnet-flax eval MODEL`: exact error rates of a network with weights."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnet_flax.cli import Parser
from resnet_flax.errors import UserError

SPLITS = ("test", "val", "validation")


def main(argv: Sequence[str]) -> int:
    """Evaluates; returns the exit status."""
    arguments = _parse(argv)
    from resnet_flax.data.preprocessing import Preprocessing
    from resnet_flax.data.sources import open_source
    from resnet_flax.evaluation.labels import as_outputs
    from resnet_flax.evaluation.pretrained import evaluate_pretrained, report
    from resnet_flax.evaluation.protocols import Network
    from resnet_flax.runtime import compilation_cache
    from resnet_flax.runtime.provenance import provenance
    from resnet_flax.runtime.storage import write_json
    from resnet_flax.weights.loading import load

    compilation_cache.enable()
    dtype = arguments.dtype or None
    found = load(
        arguments.model_name, variant=arguments.model, weights=arguments.weights, dtype=dtype
    )
    others = [load(name, dtype=dtype) for name in arguments.ensemble]
    data = arguments.data or found.config.get("data.source", "")
    if not data:
        raise UserError(f"{arguments.model_name} names no data; say --data tfds:NAME or folder:DIR")
    data_dir = arguments.data_dir or found.config.get("data.data_dir", "")
    split = arguments.split or _split(data, data_dir, arguments.data, found.config)
    _check_writable(arguments.out)
    _check_writable(arguments.confusion)
    networks = []
    names = next((one.class_names for one in (found, *others) if one.class_names), ())
    for one in (found, *others):
        if one.preprocessing is None and not (arguments.mean and arguments.std):
            raise UserError(
                f"nothing says how the images for {one.origin} are normalised; give --mean "
                "and --std, of pixels in [0, 1]"
            )
        _check_same_classes(found, one, names)
        how = _preprocessing(arguments, one.preprocessing or Preprocessing(size=0))
        networks.append(Network(one.model, one.variables, how))
    source = as_outputs(
        open_source(data, split, data_dir),
        names,
        found.model.num_classes,
        by_number=arguments.by_number,
    )
    names = names or source.class_names
    print("\n".join(one.origin for one in (found, *others)))
    print(
        f"on {data}, {split} ({len(source):,} images), {arguments.protocol}: "
        f"{_describe(networks[0].preprocessing, found.assumed)}",
        flush=True,
    )
    with _bar() as progress:
        result = evaluate_pretrained(
            networks,
            source,
            protocol=arguments.protocol,
            scales=arguments.scales,
            exact=arguments.exact,
            confusion=bool(arguments.confusion),
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=progress,
        )
    reported = report(result, names)
    _print(reported, every=arguments.per_class)
    if arguments.out:
        what = {"data": data, "split": split, "protocol": arguments.protocol}
        if arguments.protocol == "multiscale":
            what |= {"scales": arguments.scales or "default", "exact": arguments.exact}
        what |= _used(found, networks[0])
        if others:
            what["ensemble"] = [_used(*one) for one in zip(others, networks[1:], strict=True)]
        write_json(Path(arguments.out), {**what, **reported, **provenance()})
        print(f"written to {arguments.out}")
    if arguments.confusion:
        _write_confusion(Path(arguments.confusion), result.confusion, names)
        print(f"written to {arguments.confusion}: a row for each label, a column a prediction")
    return 0


def _check_same_classes(first: Any, other: Any, names: Sequence[str]) -> None:
    same = first.model.num_classes == other.model.num_classes
    if other.class_names:
        same = same and other.class_names == names
    if not same:
        raise UserError(
            f"{first.origin} and {other.origin} have other classes; give an ensemble of networks "
            "with the same classes in the same order"
        )


def _write_confusion(path: Path, matrix: Any, names: Sequence[str]) -> None:
    import csv

    names = names or [str(i) for i in range(len(matrix))]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix, strict=True))


def _used(found: Any, network: Any) -> dict[str, Any]:
    """What was evaluated, as JSON."""
    import jax.numpy as jnp

    described = network.preprocessing.to_json()
    described["pixel_mean"] = bool(described["pixel_mean"])  # long, and in the checkpoint
    return {
        "model": found.origin,
        "weights_sha256": found.sha256,
        "preprocessing": described,
        "dtype": str(jnp.dtype(found.model.dtype)),
    }


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser("eval", "Error rates of a network with weights; every image counts once.")
    parser.add_argument(
        "model_name",
        metavar="MODEL",
        help="a published name (resnet50.tv2_in1k), a weights file, a workdir, or a variant with "
        "--weights",
    )
    parser.add_argument("--data", default="", help="tfds:NAME or folder:DIR (default: the run's)")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="of TFDS")
    parser.add_argument("--split", default="", help=f"(default: the first of {', '.join(SPLITS)})")
    parser.add_argument(
        "--protocol",
        default="center",
        help="center (one view, in the middle; the default), ten_crop (centre and four corners "
        "with their flips) or multiscale (fully convolutional, with flips)",
    )
    parser.add_argument(
        "--scales", default="", help="shorter sides of multiscale (default: 224,256,384,480,640)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="multiscale without cropping longer sides to a multiple of 32; compiles every shape",
    )
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="MODEL",
        help="a further model, whose probabilities are averaged with the first's; may be repeated",
    )
    parser.add_argument("--confusion", default="", metavar="FILE.csv", help="write the matrix")
    parser.add_argument("--model", default="", metavar="VARIANT", help="of a weights file")
    parser.add_argument("--weights", default="", metavar="FILE", help="where MODEL is a variant")
    parser.add_argument("--size", type=int, help="side of the crop; 0 for none")
    parser.add_argument("--crop_fraction", type=float, help="of the resized shorter side")
    parser.add_argument("--interpolation", default="", help="bilinear or bicubic")
    parser.add_argument("--mean", default="", help="of pixels in [0, 1]: 0.485,0.456,0.406")
    parser.add_argument("--std", default="", help="the same")
    parser.add_argument("--batch_size", type=int, default=100, help="changes no figure")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--dtype", default="", help="of the computation (default: float32)")
    parser.add_argument(
        "--by_number", action="store_true", help="match classes by number, not by name"
    )
    parser.add_argument("--per_class", action="store_true", help="show every class")
    parser.add_argument("--out", default="", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args(argv)

    from resnet_flax.evaluation.protocols import PROTOCOLS

    if arguments.protocol not in PROTOCOLS:
        raise UserError(f"--protocol is one of {', '.join(PROTOCOLS)}, not {arguments.protocol!r}")
    try:
        arguments.scales = [int(scale) for scale in arguments.scales.split(",") if scale]
    except ValueError as error:
        raise UserError(f"--scales takes 224,256,384, not {arguments.scales!r}") from error
    if (arguments.scales or arguments.exact) and arguments.protocol != "multiscale":
        raise UserError("--scales and --exact are of --protocol multiscale")
    if not all(0 < scale <= 2**14 for scale in arguments.scales):
        raise UserError("--scales takes numbers of pixels from 1 to 16384")
    if arguments.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype is float32 or bfloat16, not {arguments.dtype!r}")
    if not 0 < arguments.batch_size <= 2**20:
        raise UserError(f"--batch_size takes a number from 1, not {arguments.batch_size}")
    if not 0 <= arguments.workers <= 1024:
        raise UserError(f"--workers takes a number from 0, not {arguments.workers}")
    return arguments


def _split(data: str, data_dir: str, asked: str, config: Any) -> str:
    if not asked and "data.eval_split" in config and config["data.eval_split"] != "holdout":
        return str(config["data.eval_split"])
    from resnet_flax.data.sources import splits_of

    splits = splits_of(data, data_dir)
    for split in SPLITS:
        if split in splits:
            return split
    raise UserError(f"{data} has no split {' or '.join(SPLITS)}; say which by --split")


def _preprocessing(arguments: Any, default: Any) -> Any:
    given: dict[str, Any] = {}
    for name in ("size", "crop_fraction", "interpolation"):
        if getattr(arguments, name) not in (None, ""):
            given[name] = getattr(arguments, name)
    for name in ("mean", "std"):
        if text := getattr(arguments, name):
            try:
                given[name] = tuple(float(number) for number in text.split(","))
            except ValueError as error:
                raise UserError(
                    f"--{name} takes one number or one a channel with commas between, not {text!r}"
                ) from error
    if "mean" in given:
        given["pixel_mean"] = ()  # which it is instead of
    return replace(default, **given)


def _describe(preprocessing: Any, assumed: bool) -> str:
    if not preprocessing.size:
        return "images as they are"
    shorter = preprocessing.transform.shorter
    how = f"{preprocessing.size} of {shorter}, {preprocessing.interpolation}"
    return how + " (assumed: the file does not say)" * assumed


def _check_writable(out: str) -> None:
    """Finds out now, not after the evaluation, that the file cannot be written."""
    if out:
        path = Path(out)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}; give another") from error


class _bar:  # noqa: N801  used as a function
    """A progress bar where the output is a terminal, as a context that gives what to call."""

    def __enter__(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._progress.start()
        task = self._progress.add_task("", total=None)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _print(reported: dict[str, Any], *, every: bool) -> None:
    def line(name: str, rate: dict[str, Any]) -> str:
        low, high = (100 * bound for bound in rate["interval"])
        return (
            f"{name:24.24} {100 * rate['rate']:7.2f} %  {low:6.2f} to {high:6.2f} %"
            f"  {rate['errors']:,} of {rate['count']:,}"
        )

    print(f"{'':24} {'error':>9}  {'95 % interval':>18}")
    print(line("top-1", reported["top1_error"]))
    print(line("top-5", reported["top5_error"]))
    print(f"{'negative log likelihood':24} {reported['negative_log_likelihood']:7.4f}")
    print(f"{'calibration error':24} {100 * reported['calibration_error']:7.2f} %")
    classes = sorted(reported["classes"].items(), key=lambda item: -item[1]["rate"])
    if len(classes) > 20 and not every:
        shown, left = classes[:5], f"({len(classes) - 5} more classes: --per_class or --out)"
    else:
        shown, left = classes, ""
    for name, rate in shown:
        print(line(name, rate))
    if left:
        print(left)

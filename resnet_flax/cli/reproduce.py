"""`resnet-flax reproduce list|run|show`: the paper's tables and figures."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_flax.cli.config_flags import add_settings
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.stoppable import stoppable
from resnet_flax.cli.types import directory, number, output_file, whole_number
from resnet_flax.cli.words import WORDS, told
from resnet_flax.errors import UserError, closest
from resnet_flax.runtime import storage
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import say

if TYPE_CHECKING:
    from resnet_flax.paper.planning import Training
    from resnet_flax.paper.targets import Target


def add_arguments(parser: Parser) -> None:
    """Adds the three actions."""
    parser.describe(
        "List, run or show the tables and figures of the paper. docs/reproduce.md describes what "
        "each needs.",
        "%(prog)s list",
        "%(prog)s run degradation_digits",
        "%(prog)s show degradation_digits --figure=degradation.png",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    listing = actions.add_parser("list", help="List the tables and figures.")
    listing.describe("List the tables and figures of the paper that can be reproduced.", "%(prog)s")
    listing.set_defaults(run=_list)
    running = actions.add_parser("run", help="Train and evaluate what a table or figure needs.")
    _add_run(running)
    showing = actions.add_parser("show", help="Show existing results.")
    showing.describe(
        "Print the results of a table or figure next to the paper's.",
        "%(prog)s degradation_digits",
        "%(prog)s figure7_published --figure=figure7.png",
    )
    _add_target(showing, Path, "The file of results")
    showing.set_defaults(run=_show)


def _add_run(parser: Parser) -> None:
    parser.describe(
        "Train and evaluate what a table or figure of the paper needs, and print the results "
        "next to the paper's. Called again, it continues: what is finished is not repeated.",
        "%(prog)s table6 --dry_run",
        "%(prog)s table6 --only=ResNet-20,plain-20 --seeds=5",
        "%(prog)s degradation_digits --config.steps=100",
    )
    _add_target(
        parser,
        output_file(".json"),
        "A file for the results, whose other results are kept; its directory is created if needed",
    )
    _add_trainings(parser)
    _add_limits(parser)
    parser.set_defaults(run=_run)


def _add_trainings(parser: Parser) -> None:
    trained = parser.add_argument_group("training runs")
    trained.add_argument(
        "--only",
        default="",
        metavar="ROW,ROW,...",
        help="Rows of the table to run, such as ResNet-20,plain-20 (default: all).",
    )
    trained.add_argument(
        "--seeds",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="The number of seeds for each row, which are 0 to N-1 (default: %(default)s).",
    )
    trained.add_argument(
        "--workdir",
        type=directory,
        default="runs/reproduce",
        metavar="DIR",
        help="The directory for the runs (default: %(default)s).",
    )
    trained.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="Directory with TensorFlow Datasets (TFDS) data, created if needed (default: "
        "TFDS_DATA_DIR, or ~/tensorflow_datasets).",
    )
    trained.add_argument(
        "--batch_size",
        type=whole_number(1, 2**20),
        default=100,
        metavar="N",
        help="Images in a batch of the evaluation; the results do not depend on it (default: "
        "%(default)s).",
    )
    add_settings(
        trained,
        "Change a key of every config, for a rehearsal; resnet-flax train --help lists the keys.",
    )


def _add_limits(parser: Parser) -> None:
    limits = parser.add_argument_group("time")
    limits.add_argument(
        "--dry_run",
        action="store_true",
        help="Print what the training runs would take and which data is missing, and do not train.",
    )
    limits.add_argument(
        "--minutes",
        type=number(0.0, 1e6),
        default=0.0,
        metavar="M",
        help="Minutes after which to save and stop; 0 for no limit (default: %(default)g).",
    )
    limits.add_argument(
        "--tflops",
        type=number(0.0, 1e9),
        default=0.0,
        metavar="X",
        help="The TFLOP/s that the device sustains, from which hours are estimated; 0 uses what is "
        "known or assumed of the device (default: %(default)g).",
    )


def _add_target(parser: Parser, kind: Callable[[str], Path], out: str) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="The name of a table or figure; resnet-flax reproduce list prints them.",
    )
    parser.add_argument(
        "--out",
        type=kind,
        metavar="FILE.json",
        help=f"{out} (default: results/TARGET.json).",
    )
    parser.add_argument(
        "--figure",
        type=output_file(".png"),
        metavar="FILE.png",
        help="A file for a figure of the results; its directory is created if needed (default: "
        "none is drawn).",
    )


def _list(arguments: argparse.Namespace) -> int:
    from resnet_flax.paper.targets import TARGETS

    for name, target in TARGETS.items():
        print(f"{name:20} {target.title}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from resnet_flax.paper.targets import find

    target = find(arguments.target)
    if arguments.out and not storage.exists(arguments.out):
        raise UserError(
            f"there is no file of results {arguments.out}; resnet-flax reproduce run "
            f"{arguments.target} --out={arguments.out} makes it"
        )
    _print(target, _out(arguments), arguments.figure)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    for key, flag in (("seed", "--seeds"), ("data.data_dir", "--data_dir")):
        if any(setting.startswith(f"{key}=") for setting in arguments.settings):
            raise UserError(f"pass {flag} instead of --config.{key}")
    return stoppable(lambda stop: _run_until_stopped(arguments, stop))


def _run_until_stopped(arguments: argparse.Namespace, stop: SignalHandler) -> None:
    from resnet_flax.paper import planning, runs
    from resnet_flax.paper.targets import find
    from resnet_flax.runtime import distributed

    distributed.refuse_several("reproduce run")
    target = _only(find(arguments.target), arguments.only)
    out = _out(arguments)
    if not arguments.out:
        try:
            output_file(".json")(str(out))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--out, by default {out}, {error}") from error
    runs.results(out)
    here = [f"data.data_dir={arguments.data_dir}"] if arguments.data_dir else []
    planned = planning.trainings(
        target, range(arguments.seeds), Path(arguments.workdir), [*arguments.settings, *here]
    )
    if planned:
        say(_cost(planned, arguments.tflops))
    lacks = [told(error, WORDS["reproduce"]) for error in planning.lacking(planned)]
    if arguments.dry_run:
        for sentence in lacks:
            print(f"missing data: {sentence}")
        return
    if lacks:
        raise UserError("; ".join(lacks))
    with runs.time_limit(arguments.minutes):
        diverged = runs.run(
            target,
            planned,
            out,
            stop,
            changed=planning.changes(arguments.settings),
            data_dir=arguments.data_dir,
            batch_size=arguments.batch_size,
        )
    _print(target, out, arguments.figure, say, needed=not diverged)
    if diverged:
        raise UserError(
            f"training diverged for {'; '.join(diverged)}; see above for the step and the remedy"
        )


def _only(target: "Target", names: str) -> "Target":
    if not names:
        return target
    known = {row.name: row for row in target.rows if row.config or row.members or row.weights}
    for name in names.split(","):
        if name not in known:
            rows = ", ".join(known) or "none"
            raise UserError(f"there is no row {name!r}{closest(name, known)} (known: {rows})")
    return replace(target, rows=tuple(known[name] for name in names.split(",")))


def _cost(planned: "Sequence[Training]", tflops: float) -> str:
    from resnet_flax.paper import planning

    missing = sum(one.result is None for one in planned)
    trainings = f"{len(planned)} training run{'s' * (len(planned) != 1)}"
    if not missing:
        return f"{trainings}, all finished" if len(planned) > 1 else f"{trainings}, finished"
    operations = planning.cost(planned)
    rate, measured = planning.sustained()
    how = "measured on two cores" if measured else "assumed: pass --tflops"
    if tflops:
        rate, how = tflops * 1e12, "as --tflops gives it"
    return (
        f"{trainings}, {len(planned) - missing} finished; what is left takes "
        f"{_rounded(operations / 1e15)} PFLOP, {duration(operations / rate)} at "
        f"{_rounded(rate / 1e12)} TFLOP/s ({how}), and the evaluations"
    )


def duration(seconds: float) -> str:
    """A time in a unit that suits it: '2.6 s', '18 min', '1.5 h', '37 days'."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{_rounded(seconds / size, 2)} {unit}"
    return f"{_rounded(seconds / 86400, 2)} days"


def _rounded(value: float, digits: int = 3) -> str:
    """To so many digits, or to a whole number where that has more, never as 9e+02."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _out(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path(f"results/{arguments.target}.json")


def _print(
    target: "Target",
    out: Path,
    figure: Path | None,
    say: Callable[[str], None] = print,
    *,
    needed: bool = True,
) -> None:
    """Prints a target's table and draws its figure.

    Raises:
      UserError: there is nothing to draw, and a figure is needed.
    """
    from resnet_flax.paper.figures import draw
    from resnet_flax.paper.runs import results
    from resnet_flax.paper.table import table

    found = results(out)
    say(table(target, found))
    if figure:
        if draw(target, found, figure):
            say(f"figure: {figure}")
        elif needed:
            raise UserError(f"there is nothing to draw in {out} yet; reproduce run fills it")

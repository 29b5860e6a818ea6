"""`resnet-flax reproduce list|run|show`: the paper's tables and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_flax.cli import Parser
from resnet_flax.errors import UserError
from resnet_flax.runtime.signals import SignalHandler


def main(argv: Sequence[str]) -> int:
    """Lists, runs or shows targets; returns the exit status."""
    actions = {"list": _list, "run": _run, "show": _show}
    if not argv or argv[0] not in (*actions, "-h", "--help"):
        raise UserError("say what to do: resnet-flax reproduce list, run TARGET or show TARGET")
    if argv[0] not in actions:
        argv = ["run", "--help"]
    return actions[argv[0]](argv[1:])


def _list(argv: Sequence[str]) -> int:
    Parser("reproduce list", "Names of the tables and figures.").parse_args(argv)
    from resnet_flax.paper.targets import TARGETS

    for name, target in TARGETS.items():
        print(f"{name:20} {target.title}")
    return 0


def _parser(verb: str, description: str) -> Parser:
    parser = Parser(f"reproduce {verb}", description)
    parser.add_argument("target", help="see resnet-flax reproduce list")
    parser.add_argument(
        "--out", default="", metavar="FILE.json", help="(default: results/TARGET.json)"
    )
    parser.add_argument("--figure", default="", metavar="FILE.png", help="draw what it shows")
    return parser


def _show(argv: Sequence[str]) -> int:
    arguments = _parser("show", "The table of what was run, beside the paper's.").parse_args(argv)
    from resnet_flax.paper.targets import find

    _check(arguments.figure)
    _print(find(arguments.target), _out(arguments), arguments.figure)
    return 0


def _run(argv: Sequence[str]) -> int:
    from resnet_flax.cli.train import stoppable

    parser = _parser(
        "run", "Train and evaluate what is missing, and show the table. Goes on where it stopped."
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="0 to N-1 (default: 1)")
    parser.add_argument("--workdir", default="runs/reproduce", metavar="DIR", help="of all runs")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="of TFDS")
    parser.add_argument("--only", default="", metavar="ROWS", help="such as ResNet-20,plain-20")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop then, to go on later")
    parser.add_argument("--tflops", type=float, default=0.0, help="sustained, to reckon hours by")
    parser.add_argument("--batch_size", type=int, default=100, help="of evaluation")
    parser.add_argument("--dry_run", action="store_true", help="say what it would cost and stop")
    parser.epilog = "--config.KEY=VALUE changes a key of every config, for a rehearsal"
    arguments, rest = parser.parse_known_args(argv)
    settings = []
    for flag in rest:
        if not flag.startswith("--config.") or "=" not in flag:
            raise UserError(f"there is no flag {flag!r}; see {parser.prog} --help")
        setting = flag.removeprefix("--config.")
        for key, instead in (("seed", "--seeds"), ("data.data_dir", "--data_dir")):
            if setting.startswith(f"{key}="):
                raise UserError(f"say {instead} instead of --config.{key}")
        settings.append(setting)
    if not 1 <= arguments.seeds <= 1000:
        raise UserError(f"--seeds takes a number from 1 to 1000, not {arguments.seeds}")
    if not (0 <= arguments.minutes < 1e6 and 0 <= arguments.tflops < 1e9):
        raise UserError("--minutes and --tflops take numbers from 0")
    if not 0 < arguments.batch_size <= 2**20:
        raise UserError(f"--batch_size takes a number from 1, not {arguments.batch_size}")
    return stoppable(lambda stop: _go(arguments, settings, stop))


def _go(arguments: Any, settings: list[str], stop: SignalHandler) -> None:
    from resnet_flax.paper import planning, runs
    from resnet_flax.paper.targets import find

    target = _only(find(arguments.target), arguments.only)
    out = _out(arguments)
    runs.results(out)
    _check(arguments.figure)
    here = [f"data.data_dir={arguments.data_dir}"] if arguments.data_dir else []
    planned = planning.trainings(
        target, range(arguments.seeds), Path(arguments.workdir), [*settings, *here]
    )
    if planned:
        print(_cost(planned, planning, arguments.tflops), flush=True)
    lacks = planning.lacking(planned)
    if lacks:
        raise UserError("; ".join(lacks))
    if arguments.dry_run:
        return
    with runs.time_limit(arguments.minutes):
        runs.run(
            target,
            planned,
            out,
            stop,
            changed=planning.changes(settings),
            data_dir=arguments.data_dir,
            batch_size=arguments.batch_size,
        )
    _print(target, out, arguments.figure)


def _check(figure: str) -> None:
    if figure and not figure.lower().endswith(".png"):
        raise UserError(f"--figure takes a file that ends in .png, not {figure}")


def _only(target: Any, names: str) -> Any:
    from dataclasses import replace

    from resnet_flax.errors import closest

    if not names:
        return target
    known = {row.name: row for row in target.rows if row.config or row.members or row.weights}
    for name in names.split(","):
        if name not in known:
            raise UserError(f"there is no row {name!r}{closest(name, known)} to run")
    return replace(target, rows=tuple(known[name] for name in names.split(",")))


def _cost(planned: Any, planning: Any, tflops: float) -> str:
    missing = sum(one.result is None for one in planned)
    if not missing:
        return f"{len(planned)} trainings, all finished"
    operations = planning.cost(planned)
    rate, measured = planning.sustained()
    how = "measured on two cores" if measured else "assumed: say --tflops"
    if tflops:
        rate, how = tflops * 1e12, "as said"
    hours = operations / rate / 3600
    return (
        f"{len(planned)} trainings, {len(planned) - missing} finished; what is left takes "
        f"{operations / 1e15:,.3g} PFLOP, {hours:,.2g} hours at {rate / 1e12:,.3g} TFLOP/s ({how}) "
        "and the evaluations"
    )


def _out(arguments: Any) -> Path:
    return Path(arguments.out or f"results/{arguments.target}.json")


def _print(target: Any, out: Path, figure: str) -> None:
    from resnet_flax.paper.figures import draw
    from resnet_flax.paper.runs import results
    from resnet_flax.paper.table import table

    found = results(out)
    print(table(target, found))
    if figure:
        if not draw(target, found, Path(figure)):
            raise UserError(f"there is nothing to draw in {out} yet; reproduce run fills it")
        print(f"figure: {figure}")

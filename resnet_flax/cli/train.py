"""`resnet-flax train`: also what train.py runs."""

import sys
from collections.abc import Callable, Sequence

from resnet_flax.cli import Parser
from resnet_flax.config import SCHEMA, config_name, flatten, load_config, override, resolve
from resnet_flax.errors import UserError
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import leave_quietly, say

DEFAULT = "configs/digits_resnet20.py"


def main(argv: Sequence[str]) -> int:
    """Trains; returns the exit status."""
    parser = Parser("train", "Train a network, or go on training it.")
    parser.epilog = help_on_keys()
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="where checkpoints and curves go (default: runs/ and the config's name)",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="show the resolved config and stop"
    )
    add_process_flags(parser)
    arguments, config = parse(parser, argv)
    if arguments.print_config:
        values = flatten(config)
        print("\n".join(f"{key} = {values[key]!r}" for key in SCHEMA))
        return 0

    def run(stop: SignalHandler) -> None:
        from resnet_flax.runtime import distributed

        distributed.start(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            arguments.coordinator_seconds,
        )
        from resnet_flax.training.loop import train

        train(config, arguments.workdir or f"runs/{config_name(arguments.config)}", stop)

    return stoppable(run)


def add_process_flags(parser: Parser) -> None:
    """Flags for who starts several processes by hand."""
    parser.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="of the first of several processes"
    )
    parser.add_argument("--num_processes", type=int, default=0, metavar="N", help="of all")
    parser.add_argument("--process_id", type=int, default=-1, metavar="I", help="of this, from 0")
    parser.add_argument(
        "--coordinator_seconds",
        type=int,
        default=300,
        metavar="S",
        help="to wait for the others (default: %(default)s)",
    )


def stoppable(run: Callable[[SignalHandler], None]) -> int:
    """Runs what trains; the exit status is 0, or 128 + n where signal n stopped it.

    Signals are heard from here on, before what takes seconds to import.
    """
    with SignalHandler() as stop:
        from resnet_flax.runtime import compilation_cache
        from resnet_flax.training.session import Interrupted

        compilation_cache.enable()
        try:
            run(stop)
        except Interrupted as stopped:
            say(stopped, sys.stderr)
            return 128 + stopped.signal
        finally:
            leave_quietly()
    return 0


def parse(parser: Parser, argv: Sequence[str]):  # type: ignore[no-untyped-def]
    """Adds `--config` and `--config.KEY=VALUE` to the parser's flags and parses.

    ml_collections' own flags are not used: they raise before `main` could explain, and do not
    say which key is nearest to an unknown one.

    Returns:
      The flags, and the resolved config.
    """
    parser.add_argument(
        "--config",
        default=DEFAULT,
        metavar="FILE.py[:VARIANT]",
        help="the experiment (default: %(default)s)",
    )
    arguments, rest = parser.parse_known_args(argv)
    settings = []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            kind = "flag" if argument.startswith("-") else "argument"
            raise UserError(f"there is no {kind} {argument!r}; see {parser.prog} --help")
        setting = argument.removeprefix("--config.")
        if "=" not in setting and rest and not rest[0].startswith("--"):
            setting += "=" + rest.pop(0)
        settings.append(setting)
    config = load_config(arguments.config)
    try:
        override(config, settings)
        return arguments, resolve(config)
    except UserError:
        raise
    except Exception as error:  # groups that are none, references to themselves, placeholders
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the config {arguments.config} cannot be used: {said}") from error


def help_on_keys() -> str:
    """Every config key with its default and meaning."""
    lines = [f"  {key} = {entry.default!r}\n      {entry.meaning}" for key, entry in SCHEMA.items()]
    return "config keys, changed by --config.KEY=VALUE:\n" + "\n".join(lines)

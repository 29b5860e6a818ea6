"""`resnet-flax train`, which train.py runs too."""

import argparse
from typing import TYPE_CHECKING

from resnet_flax.cli import config_flags, processes
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.stoppable import heard, stoppable
from resnet_flax.cli.types import directory
from resnet_flax.runtime.signals import SignalHandler

if TYPE_CHECKING:
    import ml_collections


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Train a network, or continue its training if the workdir has checkpoints.",
        "%(prog)s --workdir=runs/digits",
        "%(prog)s --config=configs/cifar10.py:resnet20 --config.seed=1",
        "%(prog)s --config.optim.learning_rate=0.05 --print_config",
    )
    config_flags.add_config(parser)
    parser.add_argument(
        "--workdir",
        type=directory,
        default="",
        metavar="DIR",
        help="The directory for checkpoints, curves and the result (default: runs/FILE_VARIANT, "
        "such as runs/cifar10_resnet20; with changed keys give a --workdir of their own).",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print the value of every config key, and do not train.",
    )
    processes.add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    config = config_flags.load(arguments)
    if arguments.print_config:
        _print_config(config)
        return 0

    def train_until_stopped(stop: SignalHandler) -> None:
        heartbeat = processes.start(arguments)
        from resnet_flax.apply.experiment import run_experiment
        from resnet_flax.config import config_name

        workdir = arguments.workdir or f"runs/{config_name(arguments.config)}"
        with heard(heartbeat):
            run_experiment(config, workdir, stop)

    return stoppable(train_until_stopped)


def _print_config(config: "ml_collections.ConfigDict") -> None:
    from resnet_flax.config import flatten

    print("\n".join(f"{key} = {value!r}" for key, value in flatten(config).items()))

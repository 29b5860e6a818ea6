"""`resnet-flax train`, which train.py runs too."""

import argparse
from typing import TYPE_CHECKING

from resnet_flax.cli import config_flags
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.stoppable import stoppable
from resnet_flax.cli.types import INT32, whole_number
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
    _add_process_flags(parser)
    parser.set_defaults(run=run)


def _add_process_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "multiple processes",
        "Only for processes started by hand, one on each host. SLURM, Open MPI,\n"
        "Kubernetes and Cloud TPU need none of these flags.",
    )
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="The address of the first process, to which the others connect.",
    )
    group.add_argument(
        "--num_processes",
        type=whole_number(0, INT32),
        default=0,
        metavar="N",
        help="The number of processes.",
    )
    group.add_argument(
        "--process_id",
        type=whole_number(-1, INT32),
        default=-1,
        metavar="I",
        help="The number of this process, from 0 to N-1.",
    )
    group.add_argument(
        "--coordinator_seconds",
        type=whole_number(1, INT32),
        default=300,
        metavar="S",
        help="Seconds to wait for the other processes (default: %(default)s).",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    config = config_flags.load(arguments)
    if arguments.print_config:
        _print_config(config)
        return 0

    def train_until_stopped(stop: SignalHandler) -> None:
        from resnet_flax.runtime import distributed

        distributed.start(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            arguments.coordinator_seconds,
        )
        from resnet_flax.config import config_name
        from resnet_flax.training.loop import train

        train(config, arguments.workdir or f"runs/{config_name(arguments.config)}", stop)

    return stoppable(train_until_stopped)


def _print_config(config: "ml_collections.ConfigDict") -> None:
    from resnet_flax.config import flatten
    from resnet_flax.schema import SCHEMA

    values = flatten(config)
    print("\n".join(f"{key} = {values[key]!r}" for key in SCHEMA))

"""The flags by which processes that are started by hand find each other."""

import argparse
from typing import TYPE_CHECKING

from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import INT32, whole_number

if TYPE_CHECKING:
    from resnet_flax.runtime.heartbeat import Heartbeat

# The attributes of the parsed arguments.
FLAGS = (
    *("coordinator", "num_processes", "process_id"),
    *("coordinator_seconds", "heartbeat_seconds"),
)


def add_flags(parser: Parser) -> None:
    """Adds them, in a group of their own."""
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
    group.add_argument(
        "--heartbeat_seconds",
        type=whole_number(1, INT32),
        default=30,
        metavar="S",
        help="Seconds after which a process from which nothing is heard is lost, and the others "
        "end (default: %(default)s).",
    )


def start(arguments: argparse.Namespace) -> "Heartbeat | None":
    """Connects to the other processes, if any, see `distributed.start`."""
    from resnet_flax.runtime import distributed

    return distributed.start(*(getattr(arguments, name) for name in FLAGS))

"""The command line: `resnet-flax VERB`, one module a verb, imported when it is called."""

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from resnet_flax.errors import UserError, closest
from resnet_flax.runtime import terminal
from resnet_flax.runtime.storage import OF_THE_MACHINE
from resnet_flax.runtime.terminal import leave_quietly, say

VERBS = {
    "data": "check or prepare a data set",
    "eval": "error rates of a network with weights",
    "export": "write weights as safetensors for torch's users",
    "models": "list the networks with their parameters, multiply-adds and layers",
    "reproduce": "list, run or show the tables and figures of the paper",
    "summary": "show one network layer by layer",
    "sweep": "train one config with several seeds and report mean and deviation",
    "train": "train a network, or go on training it",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s and that takes no abbreviations."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(
            prog=f"resnet-flax {verb}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
      The exit status: 0 done, 2 the user's input or machine is at fault (one sentence on
      standard error says how), 128 + n stopped by signal n with everything saved. What is this
      program's fault ends in a traceback and 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
    except UserError as error:
        status = fail(str(error))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        status = fail(f"{error.filename or 'a file'} cannot be used: {error.strerror}")
    return status


def main_and_exit(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and ends the process, also where a thread hangs in a read or a write.

    Raises:
      SystemExit: with the status of `main`.
    """
    try:
        status = main(argv)
    except Exception:
        if not _stuck():
            raise
        say(traceback.format_exc(), sys.stderr)
        status = 1
    if _stuck():
        os._exit(status)
    sys.exit(status)


def _stuck() -> bool:
    """Whether a thread is left in a read or a write, for which Python would wait for ever."""
    readers = sys.modules.get("resnet_flax.data.readers")  # Grain, if it is there, takes seconds
    return terminal.stuck() or (readers is not None and readers.stuck())


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())
        print(f"usage: resnet-flax VERB ...\n\n{listed}\n\nresnet-flax VERB --help says more.")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}{closest(verb, VERBS)}; see resnet-flax --help")
    module = importlib.import_module(f"resnet_flax.cli.{verb}")
    status: int = module.main(rest)
    return status


def fail(message: str) -> int:
    """Says what was wrong; returns the exit status."""
    say(f"error: {message}", sys.stderr)
    leave_quietly()
    return 2

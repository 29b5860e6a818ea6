"""The command line: `resnet-flax VERB`, one module per verb.

A verb's module has `add_arguments(parser)`, which also sets the function that runs the verb and
returns the exit status: `parser.set_defaults(run=run)`. That function imports what is slow to
import, such as JAX, so that help pages do not wait for it.
"""

import contextlib
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from resnet_flax import __version__
from resnet_flax.cli import leaving, words
from resnet_flax.cli.parser import Parser
from resnet_flax.errors import UserError
from resnet_flax.renamed import RenamedWarning
from resnet_flax.runtime import machine, terminal
from resnet_flax.runtime.signals import not_ignored
from resnet_flax.runtime.terminal import leave_quietly, say

VERBS = {
    "data": "Check or prepare a data set.",
    "eval": "Evaluate a network with weights.",
    "export": "Write weights as safetensors, for PyTorch.",
    "models": "List the networks with their parameters, multiply-adds and layers.",
    "reproduce": "List, run or show the tables and figures of the paper.",
    "summary": "Show one network layer by layer.",
    "sweep": "Train one config with several seeds, and report the mean and standard deviation.",
    "train": "Train a network, or continue its training.",
}


def build_parser(programs: Mapping[str, str] | None = None) -> Parser:
    """The parser of all verbs.

    Args:
      programs: what help pages call a verb's program, by verb; 'resnet-flax VERB' by default.
    """
    parser = Parser(prog="resnet-flax")
    parser.describe(
        "Residual networks in JAX: training, evaluation, and the paper's experiments. Each verb "
        "has its own page, such as resnet-flax train --help.",
        "%(prog)s train --config=configs/cifar10.py:resnet20",
        "%(prog)s eval runs/cifar10_resnet20",
        "%(prog)s reproduce list",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"resnet-flax {__version__}",
        help="Show the version and exit.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for verb, sentence in VERBS.items():
        module = importlib.import_module(f"resnet_flax.cli.{verb}")
        prog = (programs or {}).get(verb, f"resnet-flax {verb}")
        chosen = verbs.add_parser(verb, prog=prog, help=sentence)
        module.add_arguments(chosen)
    return parser


def main(argv: Sequence[str] | None = None, programs: Mapping[str, str] | None = None) -> int:
    """Runs a verb.

    Args:
      argv: the verb and its arguments; those of the process by default.
      programs: see `build_parser`.

    Returns:
      The exit status: 0 for success, 2 for an error in the user's input or machine (one sentence on
      standard error explains it), 128 + n if stopped by signal n, with everything saved, and 1 if a
      second Ctrl-C ended training before it was. A bug in this program ends in a traceback and
      status 1.
    """
    given = sys.argv[1:] if argv is None else argv
    names = words.WORDS.get(given[0], {}) if given else {}
    try:
        status = _run(given, programs)
    except UserError as error:
        status = fail(words.told(error, names))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except Exception as error:
        # A failed write to standard output names no file.
        sentence = machine.explained(error, "standard output, or a file,")
        if sentence is None:
            raise
        status = fail(words.told(sentence, names))
    return status


def main_and_exit(
    argv: Sequence[str] | None = None, programs: Mapping[str, str] | None = None
) -> NoReturn:
    """Runs a verb and ends the process, even if a thread hangs in a read or a write.

    Args:
      argv: see `main`.
      programs: see `build_parser`.

    Raises:
      SystemExit: with the status of `main`.
    """
    # The entry points have set a handler for the imports, which ends the process at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal.open_closed()
    terminal.escape_unknown()
    try:
        with not_ignored(lambda: leaving.end(128 + signal.SIGINT)):
            status = main(argv, programs)
    except Exception:
        if not _stuck():
            raise
        say(traceback.format_exc(), sys.stderr)
        status = 1
    # Python's own way out takes a moment, in which a Ctrl-C would print a traceback.
    signal.signal(signal.SIGINT, lambda *_: leaving.end(status))
    # After a second Ctrl-C, which is status 1, it would warn of a save that had just begun.
    if _stuck() or status == 1:
        leaving.end(status)
    sys.exit(status)


def _stuck() -> bool:
    """Whether a thread hangs in a read or a write; Python would wait for it forever."""
    readers = leaving.readers()
    return terminal.stuck() or (readers is not None and readers.stuck())


def _run(argv: Sequence[str], programs: Mapping[str, str] | None) -> int:
    parser = build_parser(programs)
    if argv[:1] == ["help"]:  # as in other programs: `help VERB` is `VERB --help`
        argv = [*argv[1:], "--help"]
    try:
        arguments = parser.parse(argv)
    except SystemExit:  # after a help page; errors are UserErrors
        return 0
    with _old_names_noted():
        status: int = arguments.run(arguments)
    return status


@contextlib.contextmanager
def _old_names_noted() -> Iterator[None]:
    """A context in which a warning about an old name is one line, without a source location."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedWarning)
        show_others, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *more: Any) -> None:
            if issubclass(category, RenamedWarning):
                if str(message) not in said:
                    say(f"note: {message}", sys.stderr)
                said.add(str(message))
            else:
                show_others(message, category, *more)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def fail(message: str) -> int:
    """Prints what was wrong; returns the exit status."""
    say(f"error: {message}", sys.stderr)
    leave_quietly()
    return 2

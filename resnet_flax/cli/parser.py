"""The parser of the command line: argparse with errors and help pages in plain sentences."""

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn

from resnet_flax.errors import UserError, closest

# Columns of a help page on a wide terminal.
WIDEST = 100
# What argparse says, and the same as a sentence.
_SENTENCES = (
    (r"argument (.+?): expected .*", r"\1 needs a value"),
    (r"argument (.+?): ignored explicit argument .*", r"\1 takes no value"),
    (r"the following arguments are required: (.*)", r"\1 must be given"),
)
_SETTING = "--config."
# The one flag that represents every `--config.KEY`.
SETTINGS_FLAG = "--config.KEY"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s, and which accepts no abbreviated flags.

    The parsed namespace has the attributes `parser`, the innermost parser, and `run`, set by its
    `set_defaults(run=...)`; `run` is None if a verb or an action is missing.

    Attributes:
      appendix: returns text for the end of the help page; called only when the page is shown.
    """

    appendix: Callable[[], str] | None = None

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **keywords)
        self.add_argument("-h", "--help", action="help", help="Show this page and exit.")
        self.set_defaults(parser=self, run=None)

    def describe(self, description: str, *examples: str) -> None:
        """Sets the help page's description and its examples, which start with '%(prog)s'."""
        self.description = textwrap.fill(description, 78, break_on_hyphens=False)
        if examples:
            noun = "example" if len(examples) == 1 else "examples"
            self.epilog = "\n".join([f"{noun}:", *(f"  {example}" for example in examples)])

    def format_help(self) -> str:
        """The help page."""
        page = super().format_help()
        return page if self.appendix is None else f"{page}\n{self.appendix()}\n"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of a command line.

        Raises:
          UserError: it cannot be understood.
          SystemExit: a help page was asked for, and has been printed.
        """
        arguments, unknown = self.parse_known_args(_join_settings(argv))
        innermost: Parser = arguments.parser
        if unknown:
            innermost._reject(unknown[0])
        if arguments.run is None:
            innermost._ask_for_action()
        return arguments

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage; `message` is argparse's."""
        for pattern, sentence in _SENTENCES:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, sentence, message)
                raise UserError(f"{message}; see {self.prog} --help")
        # The message comes from a function in `types` and continues after the argument's name.
        raise UserError(re.sub(r"^argument (.+?): ", r"\1 ", message))

    def _reject(self, argument: str) -> NoReturn:
        argument = argument.replace(f"{SETTINGS_FLAG}=", _SETTING, 1)
        kind, near = "argument", ""
        if argument.startswith("-"):
            kind, name = "flag", argument.partition("=")[0]
            if name in self._option_string_actions:
                raise UserError(f"the flag {argument} must come after {self.prog}")
            near = self._config_key_near(name) or self._flag_of_key(name)
            if name == "--workdir" and any(one.metavar == "MODEL" for one in self._actions):
                near = "; give the workdir itself, as MODEL"
            near = near or closest(name, {*self._option_string_actions} - {SETTINGS_FLAG})
        else:
            near = self._flag_for(argument)
        hint = near or f"; see {self.prog} --help"
        raise UserError(f"there is no {kind} {argument!r}{hint}")

    def _config_key_near(self, flag: str) -> str:
        """A hint where '--steps' is meant to be '--config.steps'."""
        if SETTINGS_FLAG not in self._option_string_actions:
            return ""
        from resnet_flax.apply import tables
        from resnet_flax.unknown_keys import keys_called

        keys = keys_called(flag.lstrip("-"), tables.keys())
        return f"; did you mean {' or '.join(_SETTING + key for key in keys)}?" if keys else ""

    def _flag_of_key(self, flag: str) -> str:
        """A hint where '--config.data.size' is meant to be '--size'."""
        last = f"--{flag.rpartition('.')[2]}"
        fits = "." in flag and last in self._option_string_actions
        return f"; did you mean {last}?" if fits else ""

    def _flag_for(self, argument: str) -> str:
        """A hint where an argument that there is not looks like the value of a flag."""
        kind, colon, _ = argument.partition(":")
        for flag, fits in (
            ("--config", kind.endswith(".py")),
            ("--data", colon and kind in ("tfds", "folder")),
            ("--workdir", os.path.isdir(argument)),
            ("--weights", os.path.isfile(argument)),
            ("--ensemble", os.path.isdir(argument)),
        ):
            if fits and flag in self._option_string_actions:
                return f"; did you mean {flag}={argument}?"
        return ""

    def _ask_for_action(self) -> NoReturn:
        (actions,) = (action for action in self._actions if action.nargs == argparse.PARSER)
        noun, words = str(actions.metavar).lower(), [*map(str, actions.choices or ())]
        article = "an" if noun == "action" else "a"
        raise UserError(
            f"{self.prog} needs {article} {noun}: {either(words)}; see {self.prog} --help"
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with the nearest of the choices in the error."""
        if action.choices is None or value in action.choices:
            return
        if action.nargs == argparse.PARSER:  # a verb or an action
            noun = str(action.metavar).lower()
            hint = closest(value, action.choices) or f"; it must be {either([*action.choices])}"
            raise UserError(f"there is no {noun} {value!r}{hint}")
        words = [*map(str, action.choices)]
        raise argparse.ArgumentError(action, f"must be {either(words)}, not {value!r}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, width=width - 2)

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if action.nargs == argparse.PARSER:  # its metavar would get a line of its own
            return text.partition("\n")[2]
        return text

    def _iter_indented_subactions(
        self, action: argparse.Action
    ) -> Generator[argparse.Action, None, None]:
        for subaction in super()._iter_indented_subactions(action):
            self._dedent()
            yield subaction
            self._indent()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def either(words: Sequence[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _join_settings(argv: Sequence[str]) -> list[str]:
    """`--config.steps=3` and `--config.steps 3` as `--config.KEY=steps=3`, one flag for all keys.

    With a flag for each key, every help page would import the schema, which is slow; and argparse
    would mistake values such as -1,2 for flags.
    """
    left, joined = list(argv), []
    while left:
        argument = left.pop(0)
        if argument.startswith(_SETTING):
            setting = argument.removeprefix(_SETTING)
            if "=" not in setting and left and not left[0].startswith("--"):
                setting += "=" + left.pop(0)
            argument = f"{SETTINGS_FLAG}={setting}"
        joined.append(argument)
    return joined

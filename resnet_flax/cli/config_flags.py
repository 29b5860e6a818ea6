"""The flags of an experiment: `--config=FILE.py:VARIANT` and `--config.KEY=VALUE`."""

import argparse
import textwrap
from typing import TYPE_CHECKING

from resnet_flax.cli.parser import SETTINGS_FLAG, Parser
from resnet_flax.errors import UserError

if TYPE_CHECKING:  # its import is slow
    import ml_collections

DEFAULT = "configs/digits_resnet20.py"


def add_config(parser: Parser) -> None:
    """Adds `--config`, `--config.KEY`, and the keys at the end of the help page.

    ml_collections' own flags are not used: they raise before `main` can explain the error, and do
    not suggest the key nearest to an unknown one.
    """
    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--config",
        default=DEFAULT,
        type=_config_file,
        metavar="FILE.py[:VARIANT]",
        help="The config of the experiment; the docstring of the file lists its variants "
        "(default: %(default)s).",
    )
    add_settings(group, "Change the value of a config key; the keys are listed below.")
    parser.appendix = keys_page


def add_settings(group: argparse._ArgumentGroup, sentence: str) -> None:
    """Adds `--config.KEY`, whose values 'key=value' are collected in `settings`."""
    group.add_argument(
        SETTINGS_FLAG,
        action="append",
        default=[],
        metavar="VALUE",
        dest="settings",
        help=f"{sentence} May be given more than once, also as {SETTINGS_FLAG}=VALUE. Lists take "
        "commas (256,480), switches true or false.",
    )


def _config_file(text: str) -> str:
    """A type for `--config`."""
    if not text.partition(":")[0]:
        raise argparse.ArgumentTypeError(f"needs a value, a config file such as {DEFAULT}")
    return text


def load(arguments: argparse.Namespace) -> "ml_collections.ConfigDict":
    """The checked config that `--config` and `--config.KEY` describe."""
    from resnet_flax.apply.tables import check, override
    from resnet_flax.config import load_config

    config = load_config(arguments.config)
    try:
        override(config, arguments.settings)
        return check(config)
    except UserError:
        raise
    except Exception as error:  # a value for a group, a cycle of references, a placeholder
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the config {arguments.config} cannot be used: {said}") from error


def keys_page() -> str:
    """Every config key with its default and meaning."""
    from resnet_flax.apply.tables import keys

    lines = [
        "config keys, with the values they have if the config file does not set them",
        "(resnet-flax train --print_config shows those of your config):",
    ]
    for key, entry in keys().items():
        lines.append(f"  {key} = {entry.default!r}")
        indent = 6 * " "
        lines.append(
            textwrap.fill(
                entry.meaning,
                78,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)

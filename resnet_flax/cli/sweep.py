"""`resnet-flax sweep`: one config, several seeds."""

from collections.abc import Sequence
from pathlib import Path

from resnet_flax.cli import Parser
from resnet_flax.cli.train import parse, stoppable
from resnet_flax.config import config_name
from resnet_flax.errors import UserError
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import say


def main(argv: Sequence[str]) -> int:
    """Trains every seed, prints mean and deviation; returns the exit status."""
    parser = Parser("sweep", "Train one config with several seeds; what is finished is kept.")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="(default: %(default)s)")
    parser.add_argument(
        "--workdir", default="", metavar="DIR", help="(default: runs/sweep/ and the config's name)"
    )
    parser.add_argument("--out", default="", metavar="FILE.json", help="write the result there")
    arguments, config = parse(parser, argv)
    seeds = _seeds(arguments.seeds)
    workdir = Path(arguments.workdir or f"runs/sweep/{config_name(arguments.config)}")

    def run(stop: SignalHandler) -> None:
        from resnet_flax.runtime.storage import write_json
        from resnet_flax.sweep import sweep

        result = sweep(config, seeds, workdir, stop)
        if arguments.out:
            write_json(Path(arguments.out), result)
            say(f"result: {arguments.out}")
        spread = "" if result["std"] is None else f" ± {result['std']:.2f}"
        say(
            f"{result['split']} error: {result['mean']:.2f}{spread} % "
            f"(n = {result['n']}, highest {result['max']:.2f})"
        )

    return stoppable(run)


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--seeds takes numbers with commas between, such as 0,1,2, not {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))

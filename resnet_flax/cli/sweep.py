"""`resnet-flax sweep`: one config, several seeds."""

import argparse
from pathlib import Path

from resnet_flax.cli import config_flags
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.stoppable import stoppable
from resnet_flax.cli.types import INT32, directory, output_file, whole_numbers
from resnet_flax.errors import UserError
from resnet_flax.runtime.signals import SignalHandler
from resnet_flax.runtime.terminal import say

SEEDS = "0,1,2,3,4"


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Train one config with several seeds, and print the mean and standard deviation of the "
        "error. Called again, it continues: a finished seed is not trained again. If training "
        "diverges with a seed, the mean is that of the others, and the exit status is 2.",
        "%(prog)s --seeds=0,1,2 --out=digits.json",
        "%(prog)s --config=configs/cifar10.py:resnet20_quick --seeds=0,1",
    )
    config_flags.add_config(parser)
    parser.add_argument(
        "--seeds",
        type=whole_numbers(0, INT32, "0,1,2"),
        default=SEEDS,
        metavar="N,N,...",
        help="The seeds to train with (default: %(default)s).",
    )
    parser.add_argument(
        "--workdir",
        type=directory,
        default="",
        metavar="DIR",
        help="The directory for the runs, one directory for each seed (default: "
        "runs/sweep/FILE_VARIANT, such as runs/sweep/cifar10_resnet20; with changed keys give a "
        "--workdir of their own).",
    )
    parser.add_argument(
        "--out",
        type=output_file(".json"),
        metavar="FILE.json",
        help="A file for the result; its directory is created if needed (default: it is only "
        "printed).",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Trains every seed, prints the mean and deviation; returns the exit status."""
    from resnet_flax.config import config_name

    if any(setting.partition("=")[0] == "seed" for setting in arguments.settings):
        raise UserError("sweep sets the seed; use --seeds instead of --config.seed")
    seeds = arguments.seeds
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds names {seed} twice; give each seed once")
    config = config_flags.load(arguments)
    workdir = Path(arguments.workdir or f"runs/sweep/{config_name(arguments.config)}")

    def sweep_until_stopped(stop: SignalHandler) -> None:
        from resnet_flax.runtime import distributed
        from resnet_flax.runtime.storage import write_json
        from resnet_flax.sweep import sweep

        distributed.refuse_several("sweep")
        result = sweep(config, seeds, workdir, stop)
        seeds_lost = list(result["diverged"])
        diverged = f"seed{'s' * (len(seeds_lost) > 1)} {' and '.join(seeds_lost)}"
        if result["n"]:
            spread = "" if result["std"] is None else f" ± {result['std']:.2f}"
            without = f", without {diverged}, which diverged" * bool(seeds_lost)
            say(
                f"{result['split']} error: {result['mean']:.2f}{spread} % "
                f"(n = {result['n']}, highest {result['max']:.2f}{without})"
            )
        if arguments.out:
            write_json(arguments.out, result)
            say(f"result: {arguments.out}")
        if seeds_lost:
            raise UserError(
                f"training diverged with {diverged}; see above for the step and the remedy"
            )

    return stoppable(sweep_until_stopped)

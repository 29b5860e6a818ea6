"""`resnet-flax export MODEL FILE`: weights as safetensors, for PyTorch."""

import argparse

from resnet_flax.cli import model_flags
from resnet_flax.cli.parser import Parser
from resnet_flax.cli.types import output_file


def add_arguments(parser: Parser) -> None:
    """Adds what `run` takes."""
    parser.describe(
        "Write weights as safetensors under torchvision's names (timm's or akamaster's where "
        "torchvision has no such network), with the preprocessing and the names of the classes.",
        "%(prog)s runs/digits_resnet20 digits.safetensors",
        "%(prog)s resnet50.tv2_in1k resnet50.safetensors",
        "%(prog)s cifar_resnet20 resnet20.safetensors --weights=resnet20.th",
    )
    model_flags.add_model(parser)
    parser.add_argument(
        "out",
        type=output_file(".safetensors"),
        metavar="FILE.safetensors",
        help="The file to write; its directory is created if needed.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the file; returns the exit status."""
    from resnet_flax.runtime import distributed
    from resnet_flax.weights.loading import export
    from resnet_flax.weights.torch_layout import layout_of

    distributed.refuse_several("export")
    found = model_flags.open_model(arguments)
    export(found, arguments.out)
    print(f"{found.origin}, in {layout_of(found.model)}'s names: {arguments.out}")
    return 0

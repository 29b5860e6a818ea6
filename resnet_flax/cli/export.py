"""`resnet-flax export MODEL FILE`: weights as safetensors that torch's users load."""

from collections.abc import Sequence
from pathlib import Path

from resnet_flax.cli import Parser
from resnet_flax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Writes the file; returns the exit status."""
    parser = Parser(
        "export",
        "Write weights as safetensors under torchvision's names (timm's or akamaster's where\n"
        "torchvision has no such network), with the preprocessing and the names of the classes.",
    )
    parser.add_argument(
        "model_name",
        metavar="MODEL",
        help="a workdir, a published name, or a weights file of another kind",
    )
    parser.add_argument("out", metavar="FILE", help="to write, FILE.safetensors")
    parser.add_argument("--model", default="", metavar="VARIANT", help="of a weights file")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"the file to write must end in .safetensors, not {out.name!r}")

    from resnet_flax.weights.loading import export, load
    from resnet_flax.weights.torch_layout import layout_of

    found = load(arguments.model_name, variant=arguments.model)
    export(found, out)
    print(f"{found.origin}, in {layout_of(found.model)}'s names: {out}")
    return 0

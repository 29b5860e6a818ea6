"""`python -m resnet_flax VERB`, the same as `resnet-flax VERB`."""

import sys
from typing import NoReturn

from resnet_flax import cli
from resnet_flax.runtime import allocator


def main() -> NoReturn:
    """The command; ends with the exit status."""
    # Training allocates the same buffers in every step; evaluation may need many sizes.
    allocator.reexec(keep=sys.argv[1:2] in (["train"], ["sweep"]))
    cli.main_and_exit()


if __name__ == "__main__":
    main()

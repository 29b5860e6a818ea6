"""`python -m resnet_flax VERB`, the same as `resnet-flax VERB`."""

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The command; ends with the exit status."""
    # A Ctrl-C during the imports ends it without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    from resnet_flax import cli
    from resnet_flax.runtime import allocator

    # Training allocates the same buffers in every step; evaluation may need many sizes.
    allocator.reexec(keep=sys.argv[1:2] in (["train"], ["sweep"]))
    cli.main_and_exit()


if __name__ == "__main__":
    main()

"""`python -m resnet_flax VERB`, the same as `resnet-flax VERB`."""

import sys

from resnet_flax import cli
from resnet_flax.memory import with_huge_pages


def main() -> int:
    """The command; returns the exit status."""
    with_huge_pages()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

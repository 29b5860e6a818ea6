"""`python -m resnet_flax VERB`, the same as `resnet-flax VERB`."""

import sys

from resnet_flax.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Trains what a config describes: `python train.py --config=configs/FILE.py --workdir=DIR`.

The same as `resnet-flax train`. `--help` lists the flags and every config key.
"""

import sys

from resnet_flax.cli import main
from resnet_flax.runtime import allocator

if __name__ == "__main__":  # reader processes import this file
    allocator.reexec(keep=True)
    sys.exit(main(["train", *sys.argv[1:]]))

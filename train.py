"""Trains what a config describes: `python train.py --config=configs/FILE.py --workdir=DIR`.

The same as `resnet-flax train`. `--help` lists the flags and every config key.
"""

import sys

from resnet_flax.cli import main_and_exit
from resnet_flax.runtime import allocator

if __name__ == "__main__":  # reader processes import this file
    allocator.reexec(keep=True)
    main_and_exit(["train", *sys.argv[1:]], {"train": "python train.py"})

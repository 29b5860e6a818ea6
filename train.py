"""Trains what a config describes: `python train.py --config=configs/FILE.py --workdir=DIR`.

The same as `resnet-flax train`. `--help` lists the flags and every config key.
"""

import os
import signal
import sys

if __name__ == "__main__":  # reader processes import this file
    # A Ctrl-C before training begins, such as during the imports, ends it without a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    from resnet_flax.cli import main_and_exit
    from resnet_flax.runtime import allocator

    allocator.reexec(keep=True)
    main_and_exit(["train", *sys.argv[1:]], {"train": "python train.py"})

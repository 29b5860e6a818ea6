"""A folder of small images, for runs that are disturbed."""

import numpy as np
from PIL import Image

from resnet_flax.config import load_config

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def make_folder(directory, train=16, val=8, size=8):
    """Writes `train` and `val` images per class, which a network learns in a few steps."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (directory / split / name).mkdir(parents=True)
            for i in range(number):
                noise = rng.integers(-60, 60, (size, size, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(directory / split / name / f"{i:03}.png")
    return directory


def folder_run(directory):
    """A config of a short run on that folder, without a checkpoint before the end."""
    from experiments import ROOT, TINY

    config = load_config(str(ROOT / "configs" / "digits_resnet20.py"))
    config.data.source = f"folder:{directory}"
    config.data.eval_split = "val"
    config.data.eval_batch_size = 8
    config.model.name = "cifar_resnet8"
    config.model.overrides = TINY
    config.data.in_memory = False
    config.batch_size = 8
    config.steps = 12
    config.optim.warmup_steps = 2
    config.eval.every = 0
    config.checkpoint.every = 0
    config.log.every = 2
    config.log.tensorboard = False
    return config

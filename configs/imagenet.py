"""ImageNet in the usual 90 epochs (Goyal et al. 2017): random resized crops, batch 1024, bfloat16.

    python train.py --config=configs/imagenet.py:resnet50 --workdir=runs/resnet50
    ... --config.data.source=folder:/data/imagenet --config.data.eval_split=val

The second line is for images in folders. TFDS prepares its own copy from archives that require
registration, as its page on `imagenet2012` explains. Variants are the networks for 224 pixels that
`resnet-flax models` lists.

Expected top-1 error of ResNet-50, one center crop: 23.5 to 24 % (Goyal et al. 23.60 ± 0.12, n=5;
torchvision's first weights 23.87; Flax's example 23.46 on 49,152 of the 50,000 images).

Hardware: 8 GPUs or TPU chips. Not trained with this code yet, so the hours are not known. At 2,500
images/s per device, which an A100 reaches with other software, 8 of them would take 1.6 hours.
"""

import ml_collections

from resnet_flax import default_config

EPOCH = 1_281_167 / 1024


def get_config(variant: str = "resnet50") -> ml_collections.ConfigDict:
    """Ninety epochs of one network."""
    config = default_config()
    config.model.name = variant
    config.model.dtype = "bfloat16"
    config.model.overrides = "" if "v2" in variant or "plain" in variant else "zero_init=True"
    config.data.source = "tfds:imagenet2012"
    config.data.eval_split = "validation"
    config.data.exif = "off"  # as in published figures, also for images in folders
    config.data.alpha = "drop"
    config.data.crop = "random_resized"
    config.data.size = 224
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.flip = True
    config.data.workers = 8
    config.batch_size = 1024
    config.steps = round(90 * EPOCH)
    config.optim.learning_rate = 0.4
    config.optim.warmup_steps = round(5 * EPOCH)
    config.optim.schedule = "piecewise"
    config.optim.boundaries = tuple(round(epoch * EPOCH) for epoch in (30, 60, 80))
    config.optim.nesterov = True
    config.optim.weight_decay = 1e-4
    config.log.every = 50
    config.eval.every = round(5 * EPOCH)
    config.checkpoint.every = round(EPOCH)
    return config

"""ImageNet as in He et al. 2015, section 3.4: scale jitter, mean image, PCA lighting, batch 256.

    python train.py --config=configs/imagenet_paper.py:resnet50_v1 --workdir=runs/resnet50_v1
    ... --config.data.source=folder:/data/imagenet --config.data.eval_split=val

The second line is for images in folders. TFDS prepares its own copy from archives that require
registration, as its page on `imagenet2012` explains. Variants, with the paper's top-1 error in
percent by ten crops (tables 2 and 3) and by one center crop (the authors' released models):

    variant        10 crops   1 crop
    plain18          27.94
    plain34          28.54
    resnet18_a       27.88
    resnet34_a       25.03
    resnet34_b       24.52
    resnet34_c       24.19
    resnet50_v1      22.85     24.7
    resnet101_v1     21.75     23.6
    resnet152_v1     21.43     23.0

600,000 steps of 256 images are 120 epochs. Hardware: 8 GPUs, so that each has the 32 images over
which the paper's batch normalization averaged. (The config asks for groups of 32 examples, which
gives the same on any number of devices.) Not trained with this code yet, so the hours are not
known. At 2,500 images/s per device, which an A100 reaches with other software, 8 of them would take
2.1 hours for ResNet-50. The paper lowers the learning rate when the error plateaus; here it drops
at the steps at which figure 4 of the paper shows that.
"""

import ml_collections

from resnet_flax import default_config
from resnet_flax.errors import UserError, closest

NETWORKS = (
    *("plain18", "plain34", "resnet18_a", "resnet34_a", "resnet34_b", "resnet34_c"),
    *("resnet50_v1", "resnet101_v1", "resnet152_v1"),
)


def get_config(variant: str = "resnet50_v1") -> ml_collections.ConfigDict:
    """The paper's training of one network.

    Raises:
      UserError: there is no such variant.
    """
    if variant not in NETWORKS:
        raise UserError(
            f"configs/imagenet_paper.py has no variant {variant!r}{closest(variant, NETWORKS)}"
        )
    config = default_config()
    config.model.name = variant
    config.model.bn_group_size = "32"
    config.data.source = "tfds:imagenet2012"
    config.data.eval_split = "validation"
    config.data.exif = "off"  # as in published figures, also for images in folders
    config.data.alpha = "drop"
    config.data.crop = "jitter"
    config.data.jitter = (256, 480)
    config.data.size = 224
    config.data.pixel_mean = True
    config.data.std = (0.25,)
    config.data.pca_lighting = 0.1
    config.data.flip = True
    config.data.workers = 8
    config.batch_size = 256
    config.steps = 600_000
    config.optim.learning_rate = 0.1
    config.optim.schedule = "piecewise"
    config.optim.boundaries = (150_000, 300_000, 450_000)
    config.optim.weight_decay = 1e-4
    config.optim.decay = "all"
    config.log.every = 100
    config.eval.every = 5_000
    config.checkpoint.every = 5_000
    return config

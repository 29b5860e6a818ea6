"""ResNet-20 on handwritten digits: the first run, on any machine."""

import ml_collections

from resnet_flax.config import default_config

EXAMPLES = 1437


def get_config() -> ml_collections.ConfigDict:
    """The experiment."""
    config = default_config()
    config.model.name = "cifar_resnet20"
    config.data.source = "tfds:digits"
    config.data.in_memory = True
    config.data.mean = (0.305,)
    config.data.std = (0.376,)
    config.data.pad = 1
    config.batch_size = 64
    config.steps = 1350  # 60 epochs
    config.optim.learning_rate = 0.1
    config.optim.nesterov = True
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 5e-4
    config.log.every = 45
    config.eval.every = 135
    config.checkpoint.every = 270
    return config

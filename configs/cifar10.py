"""CIFAR-10 as in He et al. 2015, section 4.2: every network of table 6.

    python train.py --config=configs/cifar10.py:resnet20 --workdir=runs/cifar10_resnet20

Variants, with the paper's test error in percent: resnet20 (8.75), resnet32 (7.51), resnet44
(7.17), resnet56 (6.97), resnet110 (6.61 ± 0.16, n=5; best 6.43), resnet1202 (7.93), plain20,
plain32, plain44, plain56 (in figure 6), plain110 (above 60). Each takes 64,000 steps of 128, 164
epochs. With this code only resnet20 was trained to the end, in bfloat16
(--config.model.dtype=bfloat16): 8.52 (seed 0, n=1).

Hardware: one GPU or TPU chip; the images stay in its memory. On one H200 resnet20 took two and a
half minutes, start and evaluations included. Two CPU cores train it at 310 images a second, which
would take 7 hours; other networks take time in proportion to their depth.

`resnet20_quick` (`_quick` can be added to any variant) trains for six epochs on a one-cycle
schedule, for a machine without an accelerator: 20 minutes on two CPU cores, error of resnet20
15.00 ± 0.23 (n=2). `resnet20_brief` is the same for two epochs, which shows plain networks getting
worse with depth.

Prepare the data set once by `resnet-flax data prepare tfds:cifar10`.
"""

import ml_collections

from resnet_flax import default_config
from resnet_flax.errors import UserError, closest

DEPTHS = (20, 32, 44, 56, 110)
NETWORKS = (
    *(f"{kind}{depth}" for kind in ("resnet", "plain") for depth in DEPTHS),
    "resnet1202",
)


def get_config(variant: str = "resnet20") -> ml_collections.ConfigDict:
    """The paper's training of one network, or the quick or brief one.

    Raises:
      UserError: there is no such variant.
    """
    network = variant.removesuffix("_quick").removesuffix("_brief")
    if network not in NETWORKS:
        raise UserError(
            f"configs/cifar10.py has no variant {variant!r}{closest(network, NETWORKS)}"
        )
    config = default_config()
    config.model.name = f"cifar_{network}"
    config.data.source = "tfds:cifar10"
    config.data.resident = True
    config.data.pixel_mean = True
    config.data.std = (0.25,)
    config.data.pad = 4
    config.data.flip = True
    config.data.eval_batch_size = 1000
    config.batch_size = 128
    config.steps = 64_000
    config.steps_per_dispatch = 100
    config.optim.learning_rate = 0.1
    config.optim.schedule = "piecewise"
    config.optim.boundaries = (32_000, 48_000)
    config.optim.weight_decay = 1e-4
    config.optim.decay = "all"
    config.log.every = 100
    config.eval.every = 1000
    config.checkpoint.every = 4000
    if network == "resnet1202":
        config.model.scan = True
        config.model.remat = 8
    if network in ("resnet110", "resnet1202"):  # until it begins to learn (section 4.2)
        config.optim.warmup_steps = 400
        config.optim.warmup_rate = 0.01
    if variant != network:
        epochs = 6 if variant.endswith("_quick") else 2
        config.steps = 391 * epochs
        config.optim.schedule = "onecycle"
        config.optim.boundaries = ()
        config.optim.learning_rate = 0.4
        config.optim.warmup_steps = 700 * epochs // 6
        config.optim.warmup_rate = 0.0
        config.optim.weight_decay = 5e-4
        config.optim.decay = "kernels"
        config.optim.nesterov = True
        config.eval.every = 391
        config.checkpoint.every = 782
        config.steps_per_dispatch = 10
    return config

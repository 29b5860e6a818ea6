"""Learning-rate schedules and optimisers."""

from typing import Any

import jax
import ml_collections
import optax


def make_schedule(optim: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      optim: the config's `optim`.
      steps: total training steps; a cosine, or one cycle (linear up over the warm-up and down after
        it), reaches 0 at the end.
    """
    rate, warmup = optim.learning_rate, optim.warmup_steps
    if optim.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, steps - warmup)
    elif optim.schedule == "onecycle":
        main = optax.linear_schedule(rate, 0.0, steps - warmup)
    elif optim.schedule == "piecewise":
        # join_schedules restarts the count after the warm-up; boundaries count from the start.
        drops = {int(step) - warmup: optim.drop for step in optim.boundaries}
        main = optax.piecewise_constant_schedule(rate, drops)
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    rise = optax.linear_schedule(0.0, rate, warmup)
    if optim.warmup_rate:
        rise = optax.constant_schedule(optim.warmup_rate)
    return optax.join_schedules([rise, main], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the kernels of convolutions and the head, False for scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    optim: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum and coupled L2 weight decay, as in the paper: added before the momentum.

    Args:
      optim: the config's `optim`.
      schedule: the learning rate, see `make_schedule`.
    """
    mask = decay_mask if optim.decay == "kernels" else None
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask),
        optax.sgd(schedule, momentum=optim.momentum, nesterov=optim.nesterov),
    )

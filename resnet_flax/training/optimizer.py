"""Learning-rate schedules and optimizers, and the tables of them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from resnet_flax.errors import UserError
from resnet_flax.keys import FRACTION, NOT_NEGATIVE, POSITIVE, STEPS, Entry, Key, one_of

# optax is imported in the functions: help pages list the keys of these tables, without the second
# that importing JAX takes.
if TYPE_CHECKING:
    import ml_collections
    import optax

Schedule = Callable[[Any], Any]  # the learning rate by the step, as optax's


def make_schedule(optim: "ml_collections.ConfigDict", steps: int, factor: float = 1.0) -> Schedule:
    """The learning rate as a function of the step.

    Args:
      optim: the config's `optim`; its `schedule` follows the warm-up.
      steps: total training steps.
      factor: of all rates.
    """
    import jax
    import optax

    rate, warmup = optim.learning_rate, optim.warmup_steps
    main = SCHEDULES[optim.schedule].make(optim, steps - warmup)
    if not callable(main):
        raise UserError(
            f"the schedule {optim.schedule!r} makes {main!r}; it must make a function of the step"
        )
    if warmup:
        rise = optax.linear_schedule(0.0, rate, warmup)
        if optim.warmup_rate:
            rise = optax.constant_schedule(optim.warmup_rate)
        main = optax.join_schedules([rise, main], [warmup])

    def promoting(step: Any) -> Any:
        # optax needs the promotion of types, which JAX's settings may forbid.
        with jax.numpy_dtype_promotion("standard"):
            return main(step) if factor == 1 else factor * main(step)

    return promoting


def _cosine(optim: "ml_collections.ConfigDict", steps: int) -> Schedule:
    """Half a cosine, from the rate to 0 at the end."""
    import optax

    return optax.cosine_decay_schedule(optim.learning_rate, steps)


def _one_cycle(optim: "ml_collections.ConfigDict", steps: int) -> Schedule:
    """Linear to 0 at the end, after a linear warm-up."""
    import optax

    return optax.linear_schedule(optim.learning_rate, 0.0, steps)


def _piecewise(optim: "ml_collections.ConfigDict", steps: int) -> Schedule:
    """A constant that drops at some steps."""
    import optax

    del steps
    # A schedule counts from the end of the warm-up, boundaries from the start of the training.
    drops = {int(step) - optim.warmup_steps: optim.drop for step in optim.boundaries}
    return optax.piecewise_constant_schedule(optim.learning_rate, drops)


def _check_piecewise(flat: Mapping[str, Any]) -> None:
    if not flat["optim.boundaries"]:
        raise UserError("optim.schedule=piecewise needs optim.boundaries, the steps of its drops")


def _constant(optim: "ml_collections.ConfigDict", steps: int) -> Schedule:
    import optax

    del steps
    return optax.constant_schedule(optim.learning_rate)


# By `optim.schedule`: from the config's `optim`, and the number of steps from the end of the
# warm-up to the end of the training, to a schedule that counts from the end of the warm-up.
SCHEDULES: dict[str, Entry] = {
    "cosine": Entry(_cosine),
    "piecewise": Entry(
        _piecewise,
        {
            "optim.boundaries": Key((), "Steps at which a piecewise rate drops.", STEPS),
            "optim.drop": Key(0.1, "Factor of each drop of a piecewise rate.", POSITIVE),
        },
        _check_piecewise,
    ),
    "constant": Entry(_constant),
    "onecycle": Entry(_one_cycle),
}


def decay_mask(params: Any) -> Any:
    """True for the kernels of convolutions and the head, False for scales and biases."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    optim: "ml_collections.ConfigDict", schedule: Schedule
) -> "optax.GradientTransformation":
    """The optimizer that the config's `optim` names.

    Args:
      optim: the config's `optim`.
      schedule: the learning rate, see `make_schedule`.
    """
    found = OPTIMIZERS[optim.optimizer].make(optim, schedule)
    if not hasattr(found, "init") or not hasattr(found, "update"):
        raise UserError(
            f"the optimizer {optim.optimizer!r} makes {found!r}; it must make an optax "
            "transformation, which has init and update"
        )
    return found  # type: ignore[no-any-return]


def _sgd(optim: "ml_collections.ConfigDict", schedule: Schedule) -> "optax.GradientTransformation":
    """SGD with momentum and coupled L2 weight decay, as in the paper: added before the momentum."""
    import optax

    mask = decay_mask if optim.decay == "kernels" else None
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask),
        optax.sgd(schedule, momentum=optim.momentum, nesterov=optim.nesterov),
    )


# By `optim.optimizer`: from the config's `optim` and the schedule to an optax transformation.
OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(
        _sgd,
        {
            "optim.momentum": Key(0.9, "Momentum of SGD.", FRACTION),
            "optim.nesterov": Key(False, "Use Nesterov momentum."),
            "optim.weight_decay": Key(
                1e-4,
                "Weight decay as an L2 gradient, which is added before the momentum.",
                NOT_NEGATIVE,
            ),
            "optim.decay": Key(
                "kernels", "Parameters that decay: kernels, or all.", one_of("kernels", "all")
            ),
        },
    ),
}

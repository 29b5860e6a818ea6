"""Training losses, and the table of them."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from resnet_flax.keys import FRACTION, Entry, Key

# JAX is imported in the functions: help pages list the keys of these tables, without its second.
if TYPE_CHECKING:
    import jax
    import ml_collections

# Of logits `[b, classes]` and targets (see `cross_entropy`), the loss of each example, `[b]`.
Loss = Callable[..., Any]


def cross_entropy(logits: "jax.Array", targets: "jax.Array", smoothing: float = 0.0) -> "jax.Array":
    """Cross-entropy of each example, in nats.

    Args:
      logits: unnormalized log-probabilities, `[b, classes]`.
      targets: indices of the true classes, `[b]`, or probabilities of all, `[b, classes]`.
      smoothing: fraction of the target spread evenly over all classes (Szegedy et al. 2016,
        section 7).

    Returns:
      `[b]`.
    """
    import jax
    import optax

    if targets.ndim == 1:
        if not smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    if smoothing:
        targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def _cross_entropy(optim: "ml_collections.ConfigDict") -> Loss:
    return partial(cross_entropy, smoothing=optim.label_smoothing)


# By `optim.loss`: from the config's `optim` to a `Loss`.
LOSSES: dict[str, Entry] = {
    "cross_entropy": Entry(
        _cross_entropy,
        {
            "optim.label_smoothing": Key(
                0.0, "Fraction of the target that is spread evenly over all classes.", FRACTION
            )
        },
    ),
}

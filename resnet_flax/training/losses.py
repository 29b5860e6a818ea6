"""Training losses."""

import jax
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    targets: Int[Array, " b"] | Float[Array, "b classes"],
    smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """Cross-entropy of each example, in nats.

    Args:
      logits: unnormalised log-probabilities.
      targets: indices of the true classes, or probabilities of all.
      smoothing: fraction of the target spread evenly over all classes (Szegedy et al. 2016,
        section 7).
    """
    if targets.ndim == 1:
        if not smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    if smoothing:
        targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits, targets)

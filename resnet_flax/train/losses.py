"""Training losses."""

import jax
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Cross-entropy of each example, in nats.

    Args:
      logits: unnormalised log-probabilities.
      labels: indices of the true classes.
      smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016,
        section 7).
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    classes = logits.shape[-1]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets)

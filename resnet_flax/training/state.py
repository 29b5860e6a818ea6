"""The state of training: arrays only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes, and that is saved in a checkpoint.

    A pytree, so `jax.tree.map` makes trees of shapes or shardings from it.

    Attributes:
      step: steps taken, int32 `[]`; with the seed it determines the position in the data and
        all randomness.
      params: the network's parameters.
      batch_stats: running statistics of batch normalisation.
      opt_state: state of the optimiser.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    seed: int | Int[Array, ""],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
) -> TrainState:
    """The state before the first step; a pure function, to be compiled with shardings.

    Args:
      seed: of the initial parameters.
      model: the network.
      tx: the optimiser.
      image_shape: `(height, width, channels)` of an image.
    """
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params))

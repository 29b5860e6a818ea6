"""Classification: one label for each image."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from resnet_flax.errors import UserError
from resnet_flax.evaluation.result import Metrics, States
from resnet_flax.evaluation.step import eval_step

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task of a classifier; a `training.programs.Task`.

    Attributes:
      model: the network.
      augment: `(images, labels, step, seed) -> x, targets`, augmentation and normalization of a
        global training batch on the device.
      normalize: `(images) -> x`, that of an evaluation.
      loss: `(logits, targets) -> [b]`, see `training.losses`.
      measures: the metrics of an evaluation.
    """

    model: Any
    augment: Callable[..., tuple[Array, Array]]
    normalize: Callable[[Array], Array]
    loss: Callable[[Array, Array], Array]
    measures: Metrics

    def prepare(self, batch: Batch, step: Any, seed: Any) -> Batch:
        """Augments and normalizes.

        Args:
          batch: `image` `[b, h, w, c]` uint8, `label` `[b]` int32 and `mask` `[b]`.
          step: number of the batch.
          seed: of the run.

        Returns:
          The same with `image` as the network takes it, and `target` as `loss` does.
        """
        image, target = self.augment(batch["image"], batch["label"], step, seed=seed)
        return {**batch, "image": image, "target": target}

    def loss_fn(
        self, params: Any, batch_stats: Any, batch: Batch, rng: Array, step: Any
    ) -> tuple[Array, tuple[dict[str, Array], Any]]:
        """The loss and the metrics of a prepared batch, as sums over the examples that count.

        Returns:
          The loss, `({"error": number of wrong predictions}, batch_stats)`.
        """
        del step
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        losses = self.loss(logits, batch["target"])
        _check_losses(losses, logits)
        wrong = batch["mask"] & (logits.argmax(-1) != batch["label"])
        loss = (losses * batch["mask"].astype(losses.dtype)).sum()
        return loss, ({"error": wrong.sum()}, updated["batch_stats"])

    def keeping_nothing(self) -> "Classification":
        """The same with running statistics that are those of the newest batch."""
        return dataclasses.replace(self, model=self.model.clone(norm_momentum=0.0))

    def eval_step(self, variables: Any, batch: Batch, states: States) -> States:
        """Adds a batch of an evaluation, see `evaluation.step`."""
        return eval_step(
            *(variables, batch, states),
            model=self.model,
            prepare=self.normalize,
            metrics=self.measures,
        )


def _check_losses(losses: Any, logits: Array) -> None:
    """Raises UserError unless there is one for each example: others might broadcast to them."""
    fits = isinstance(losses, jax.Array) and losses.shape == logits.shape[:1]
    if not fits or not jnp.issubdtype(losses.dtype, jnp.floating):
        is_array = isinstance(losses, jax.Array | np.ndarray)
        was = f"{losses.dtype} {list(losses.shape)}" if is_array else f"a {type(losses).__name__}"
        raise UserError(
            f"the loss of logits {list(logits.shape)} is {was}; a loss must return a "
            f"floating-point number for each example, {list(logits.shape[:1])}"
        )

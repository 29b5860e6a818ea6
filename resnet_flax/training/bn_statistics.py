"""Batch normalisation's statistics after the last step."""

import dataclasses

import jax
import numpy as np

from resnet_flax import sharding
from resnet_flax.data.pipeline import Batch
from resnet_flax.training.parts import complete_batches
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState


def recompute_statistics(run: Run, state: TrainState) -> TrainState:
    """Replaces batch normalisation's running statistics by an average over training batches.

    The batches are those that would come next. He et al. evaluate in this way, according to the
    notes of their released models.

    Args:
      run: its config's `eval.recompute_bn` is the number of batches.
      state: after the last step.

    Raises:
      CommonError: with several processes, one could not read its part of the batches.
    """
    steps, number = run.config.steps, run.config.eval.recompute_bn
    seed = sharding.put_number(run.config.seed, run.mesh)
    total = jax.device_put(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.batch_stats),
        run.programs.shardings.batch_stats,
    )

    def blank(i: int) -> Batch:
        return run.blank_train_batch(steps + i)

    what = "the batches of eval.recompute_bn"
    with run.train_batches(steps) as batches:
        parts = complete_batches(batches, number, blank, what, steps)
        for i, batch in enumerate(parts):
            step = sharding.put_number(steps + i, run.mesh)
            before, put = total, sharding.put_batch(batch, run.mesh)
            total = run.programs.statistics_step(state.params, put, step, total, seed)
            jax.block_until_ready(before)  # at most two are in flight, as in `evaluate`
    with jax.transfer_guard("allow"):  # the number, which is a constant of the division
        statistics = jax.tree.map(lambda leaf: leaf / number, total)
    return dataclasses.replace(state, batch_stats=statistics)

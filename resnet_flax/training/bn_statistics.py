"""Batch normalisation's statistics after the last step."""

import dataclasses
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax import sharding
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState


def recompute_statistics(run: Run, state: TrainState) -> TrainState:
    """Replaces batch normalisation's running statistics by an average over training batches.

    The batches are those that would come next. He et al. evaluate in this way, according to the
    notes of their released models.

    Args:
      run: its config's `eval.recompute_bn` is the number of batches.
      state: after the last step.
    """
    steps, number = run.config.steps, run.config.eval.recompute_bn
    total = jax.tree.map(jnp.zeros_like, state.batch_stats)
    with run.train_batches(steps) as batches:
        for i, batch in enumerate(islice(batches, number)):
            step = np.int32(steps + i)
            before, put = total, sharding.put_batch(batch, run.mesh)
            total = run.programs.statistics_step(state.params, put, step, total)
            jax.block_until_ready(before)  # at most two are in flight, as in `evaluate`
    statistics = jax.tree.map(lambda leaf: leaf / number, total)
    return dataclasses.replace(state, batch_stats=statistics)

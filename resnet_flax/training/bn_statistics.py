"""Batch normalisation's statistics after the last step."""

import dataclasses
from itertools import islice

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from resnet_flax import sharding
from resnet_flax.data.pipeline import train_batches
from resnet_flax.data.readers import PATIENT, Patience
from resnet_flax.training.setup import Run
from resnet_flax.training.state import TrainState


def recompute_statistics(
    run: Run,
    config: ml_collections.ConfigDict,
    state: TrainState,
    patience: Patience = PATIENT,
) -> TrainState:
    """The state with batch normalisation's statistics as a strict average over training batches.

    Of the batches that would come next. He et al. evaluate so: the notes of their released models.

    Args:
      run: what `config` was made into.
      config: see there.
      state: after the last step.
      patience: see `readers.reading`.
    """
    number = config.eval.recompute_bn
    total = jax.tree.map(jnp.zeros_like, state.batch_stats)
    with train_batches(
        run.train_source,
        seed=config.seed,
        batch_size=config.batch_size,
        transform=run.train_transform,
        repeats=config.data.repeats,
        start=config.steps,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
        patience=patience,
    ) as batches:
        for i, batch in enumerate(islice(batches, number)):
            step = np.int32(config.steps + i)
            total = run.programs.statistics_step(
                state.params, sharding.put_batch(batch, run.mesh), step, total
            )
    statistics = jax.tree.map(lambda leaf: leaf / number, total)
    return dataclasses.replace(state, batch_stats=statistics)

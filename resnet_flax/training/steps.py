"""One step of training as a pure function, independent of the number of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from resnet_flax.ops import dispatch
from resnet_flax.training.norms import tree_norm
from resnet_flax.training.state import TrainState

Batch = dict[str, Array]
Sums = dict[str, Array]
Prepare = Callable[..., Batch]
LossFn = Callable[..., tuple[Array, tuple[Sums, Any]]]

# `augment` derives its keys from the seed by smaller numbers, the last ones before 2**32 and the
# positions of examples.
NETWORK = 2**32 - 1 - 4


def train_step(
    state: TrainState,
    batch: Batch,
    seed: Int[Array, ""] | int,
    *,
    loss_fn: LossFn,
    prepare: Prepare,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
    bn_group_size: int = 1,
    gather: Callable[[Any], Any] = lambda params: params,
    norm: Callable[[Any], Array] = tree_norm,
) -> tuple[TrainState, Sums]:
    """One step of gradient descent on one global batch, whatever the task.

    Args:
      state: before the step.
      batch: arrays whose first axis is that of the examples, with `mask` `[b]`, true for examples
        that count.
      seed: of the run.
      loss_fn: `(params, batch_stats, batch, rng, step) -> loss, (metrics, batch_stats)` for a
        prepared microbatch. The loss and each of the metrics is a sum over the examples that
        count; the step minimizes the loss divided by their number in the whole batch. `rng` is a
        key that differs for every seed, step and microbatch.
      prepare: `(batch, step, seed) -> batch`, augmentation and normalization of the whole batch on
        the device.
      tx: the optimizer.
      num_microbatches: number of microbatches that the batch is split into, whose gradients are
        computed one after another and added; the model's `ghost_batches` are those of one
        microbatch.
      bn_group_size: number of consecutive examples that batch normalization averages over, which
        stay in one microbatch.
      gather: gathers sharded parameters, see `sharding.gather`.
      norm: `norms.tree_norm`, or a faster one, see `norms.norm_over`.

    Returns:
      The state after the step, and this batch's sums: `loss`, the metrics and `count` (examples);
      and the norms `grad_norm` of the gradient, `param_norm` of the parameters after the step and
      `stats_norm` of the running statistics after it.
    """
    batch = prepare(batch, state.step, seed)
    count = batch["mask"].sum()
    rng = step_key(seed, state.step)

    def loss_of(params: Any, microbatch: Batch, number: Any) -> tuple[Array, Any]:
        key = jax.random.fold_in(rng, number)
        loss, others = loss_fn(gather(params), state.batch_stats, microbatch, key, state.step)
        return loss / count.astype(loss.dtype), others

    gradient = partial(jax.value_and_grad(loss_of, has_aux=True), state.params)
    if num_microbatches == 1:
        (loss, (metrics, batch_stats)), grads = gradient(batch, 0)
    else:
        (loss, (metrics, batch_stats)), grads = _accumulated(
            gradient, batch, num_microbatches, bn_group_size
        )
        # Each microbatch updated the same running statistics; the mean of these is the update by
        # all groups together.
        batch_stats = jax.tree.map(lambda leaf: leaf / num_microbatches, batch_stats)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state)
    sums = {
        **metrics,
        "loss": loss * count.astype(loss.dtype),
        "count": count,
        "grad_norm": norm(grads),
        "param_norm": norm(params),
        "stats_norm": norm(batch_stats),
    }
    return new_state, sums


def step_key(seed: Int[Array, ""] | int, step: Int[Array, ""] | int) -> Array:
    """The random key of a step, for the network: none of those that augmentation uses."""
    key = jax.random.fold_in(jax.random.key(seed), NETWORK)
    return jax.random.fold_in(key, step)


def unless_incomplete(
    state: TrainState,
    batch: Batch,
    seed: Int[Array, ""] | int,
    *,
    train: Callable[..., tuple[TrainState, Sums]],
) -> tuple[TrainState, Sums]:
    """A training step that changes nothing if an example does not count.

    If one of several processes fails to read its part of a batch, it contributes a part whose
    `mask` is false. All processes see that in the sum `count`, and can save the state before the
    step.

    Args:
      state: before the step.
      batch: see `train_step`.
      seed: of the run.
      train: `train_step`, its keywords bound.
    """
    new, sums = train(state, batch, seed)
    complete = batch["mask"].all()
    return jax.tree.map(partial(jnp.where, complete), new, state), sums


def _accumulated(
    function: Callable[..., Any], batch: Any, num_microbatches: int, group_size: int
) -> Any:
    """The sum of a function's values on the microbatches of a batch, computed one at a time.

    The function takes a microbatch and its number.
    """

    def cut(array: Array) -> Array:
        # Strided, not contiguous: each device then has its part of every microbatch in its part of
        # the batch.
        groups = array.reshape(-1, num_microbatches, group_size, *array.shape[1:])
        return groups.swapaxes(0, 1).reshape(num_microbatches, -1, *array.shape[1:])

    def add(total: Any, numbered: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*numbered)), None

    cuts = (jax.tree.map(cut, batch), jnp.arange(num_microbatches))
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], cuts))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, cuts)[0]


def statistics_step(
    params: Any,
    batch: Batch,
    step: Array,
    total: Any,
    seed: Int[Array, ""] | int,
    *,
    loss_fn: LossFn,
    prepare: Prepare,
) -> Any:
    """Adds the mean and variance of one training batch, at each normalization, to `total`.

    Args:
      params: of the network.
      batch: see `train_step`.
      step: number of the batch.
      total: of the previous batches.
      seed: of the run.
      loss_fn: see `train_step`, of a network that keeps nothing of its running statistics, so that
        they are those of the batch.
      prepare: see `train_step`.
    """
    batch = prepare(batch, step, seed)
    zeros = jax.tree.map(jnp.zeros_like, total)
    # In one pass a variance would be relative to initial zeros, and lose digits far from them.
    with dispatch.override(statistics="two_pass", conv_bn_1x1="unfused", conv_bn_3x3="unfused"):
        _, (_, of_batch) = loss_fn(params, zeros, batch, step_key(seed, step), step)
    return jax.tree.map(jnp.add, total, of_batch)


def resident_steps(
    state: TrainState,
    data: dict[str, Array],
    indices: Int[Array, "k b"],
    n: Int[Array, ""] | int,
    seed: Int[Array, ""] | int,
    *,
    train: Callable[..., tuple[TrainState, Sums]],
    batch_sharding: Any,
) -> tuple[TrainState, Sums]:
    """The first `n` of `k` training steps, on data that is resident on the devices.

    Args:
      state: before the steps.
      data: `image` `[m, h, w, c]` uint8 and `label` `[m]` int32 of all training examples.
      indices: of the examples of each batch.
      n: how many steps to take.
      seed: of the run.
      train: `train_step`, its keywords bound.
      batch_sharding: of a batch.

    Returns:
      The state after the steps, and the sums of each step, `[k]`, of which the first n are set.
    """

    def step(i: Any, state: TrainState) -> tuple[TrainState, Sums]:
        batch = {name: array[indices[i]] for name, array in data.items()}
        batch["mask"] = jnp.ones(indices.shape[1], bool)
        return train(state, jax.lax.with_sharding_constraint(batch, batch_sharding), seed)

    shapes = jax.eval_shape(partial(step, 0), state)[1]
    empty = jax.tree.map(lambda s: jnp.zeros((len(indices), *s.shape), s.dtype), shapes)

    def body(i: Array, carry: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
        state, sums = carry
        state, new = step(i, state)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), sums, new)

    return jax.lax.fori_loop(0, n, body, (state, empty))

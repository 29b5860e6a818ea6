"""The steps of training as programs over a mesh: `jax.jit` with shardings."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from resnet_flax import sharding
from resnet_flax.evaluation.compile import jit
from resnet_flax.evaluation.step import compile_eval
from resnet_flax.runtime.xla_options import Options
from resnet_flax.training.state import TrainState
from resnet_flax.training.steps import Sums, resident_steps


def compile_steps(
    mesh: Mesh,
    state_shardings: Any,
    train: Callable[..., Any],
    evaluate: Callable[..., Any],
    options: Options | None = None,
) -> tuple[Callable[..., tuple[TrainState, Sums]], Callable[..., Any]]:
    """`train_step` and a task's `eval_step` (keywords bound) as programs over the mesh.

    The state is donated to the training step, which reuses its buffers for the new state.

    Args:
      mesh: of the devices.
      state_shardings: of the state.
      train: the training step.
      evaluate: the evaluation step.
      options: see `xla_options.options`; programs with options cannot be part of others.
    """
    replicated, sharded = sharding.replicated(mesh), sharding.over_batch(mesh)
    compiled_train = jit(
        train,
        options,
        in_shardings=(state_shardings, sharded, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
    return compiled_train, compile_eval(mesh, state_shardings.variables, evaluate, options)


def compile_statistics(
    mesh: Mesh,
    state_shardings: Any,
    function: Callable[..., Any],
    options: Options | None = None,
) -> Callable[..., Any]:
    """`statistics_step` (its keywords bound) as a program over the mesh."""
    replicated, stats = sharding.replicated(mesh), state_shardings.batch_stats
    return jit(
        function,
        options,
        in_shardings=(
            *(state_shardings.params, sharding.over_batch(mesh), replicated),
            *(stats, replicated),
        ),
        out_shardings=stats,
    )


class ResidentSteps(NamedTuple):
    """`resident_steps` as programs.

    Attributes:
      some: takes `n` of `k` steps. `(state, data, indices, n, seed)`.
      every: takes all steps, in a loop of a length known at compile time, so that a GPU does not
        ask the host before each step whether to continue; None on other devices. `(state, data,
        indices, seed)`.
      mesh: of the devices.
    """

    some: Any
    every: Any
    mesh: Mesh

    def __call__(
        self, state: TrainState, data: dict[str, Array], indices: Array, n: int, seed: Any
    ) -> tuple[TrainState, Sums]:
        """The first `n` steps, see `resident_steps`."""
        if self.every is not None and n == len(indices):
            return self.every(state, data, indices, seed)
        return self.some(state, data, indices, sharding.put_number(n, self.mesh), seed)


def compile_resident(
    mesh: Mesh,
    state_shardings: Any,
    train: Callable[..., Any],
    known_length: bool | None = None,
    options: Options | None = None,
) -> ResidentSteps:
    """`resident_steps` of `train_step` (its keywords bound) as programs over the mesh.

    Args:
      mesh: of the devices.
      state_shardings: of the state.
      train: the step.
      known_length: also compile `every`; by default on a GPU.
      options: see `xla_options.options`.
    """
    replicated = sharding.replicated(mesh)
    steps = partial(resident_steps, train=train, batch_sharding=sharding.over_batch(mesh))
    inputs = (state_shardings, replicated, sharding.over_batch(mesh, axis=1))
    compiled = partial(
        jit, options=options, out_shardings=(state_shardings, replicated), donate_argnums=0
    )

    def every(state: TrainState, data: Any, indices: Array, seed: Any) -> tuple[TrainState, Sums]:
        return steps(state, data, indices, len(indices), seed)

    if known_length is None:
        known_length = mesh.devices.flat[0].platform not in ("cpu", "tpu")
    return ResidentSteps(
        compiled(steps, in_shardings=(*inputs, replicated, replicated)),
        compiled(every, in_shardings=(*inputs, replicated)) if known_length else None,
        mesh,
    )


def compile_init(
    init: Callable[..., TrainState], mesh: Mesh
) -> tuple[Callable[..., TrainState], Any]:
    """`init_state` (its keywords bound) as a program whose outputs are sharded.

    Returns:
      The program, and the shardings of the state.
    """
    shardings = sharding.for_state(jax.eval_shape(partial(init, 0)), mesh)
    # XLA's CPU backend takes seconds to optimise this program, which runs once: for ResNet-20 2.3 s
    # on JAX 0.10 and 8.2 s on 0.12, instead of 0.6 s.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options), shardings

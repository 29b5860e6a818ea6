"""A step computes the same on any mesh, with only the necessary communication."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from classifiers import classification
from marks import long

from resnet_flax import create_model, sharding
from resnet_flax.apply.tables import default_config
from resnet_flax.data.augment import crop_and_flip
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.ops import dispatch
from resnet_flax.training.collectives import collectives, totals
from resnet_flax.training.compile import compile_init, compile_steps
from resnet_flax.training.optimizer import make_optimizer
from resnet_flax.training.state import init_state
from resnet_flax.training.steps import train_step

BATCH = 16
FUSED_1X1 = {"overrides": (("conv_bn_1x1", "fused"),)}  # see ops.override
NORMS = {
    "global": {},
    "groups of 4": {"ghost_batches": 4},
    "group": {"norm": "group"},
    "global, fused 1x1": {"block": "bottleneck", **FUSED_1X1},
}


def _batches(n, batch=BATCH):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield {
            "image": rng.integers(0, 256, (batch, 8, 8, 3), np.uint8),
            "label": rng.integers(0, 10, batch).astype(np.int32),
            "mask": np.ones(batch, bool),
        }


def _program(mesh, axes, dtype, **settings):
    axes = dict(axes)
    overrides = dict(axes.pop("overrides", ()))
    types = {"dtype": dtype, "param_dtype": dtype}
    widths = {"stage_sizes": (1, 1), "stage_features": (8, 32), "stem_features": 8}
    model = create_model("cifar_resnet8", **types, **{**widths, **axes})
    tx = make_optimizer(default_config().optim, optax.constant_schedule(0.1))
    norm = partial(Preprocessing(mean=(0.3,), std=(0.4,)).standardize, dtype=dtype)
    init, shardings = compile_init(
        partial(init_state, model=model, tx=tx, image_shape=(8, 8, 3)), mesh
    )

    def augment(x, y, step, seed):
        return norm(crop_and_flip(x, step, seed=seed, pad=1, flip=True)), y

    task = classification(model, augment, norm)
    gather = sharding.gather(shardings.params, mesh)
    train = partial(
        train_step,
        loss_fn=task.loss_fn,
        prepare=task.prepare,
        tx=tx,
        gather=gather,
        **settings,
    )
    train = dispatch.override(**overrides)(train)
    step, _ = compile_steps(mesh, shardings, train, task.eval_step)
    return init, step


def _run(mesh, axes, **settings):
    """The states after one step and after ten, and the sums of the first."""
    init, step = _program(mesh, axes, jnp.float64, **settings)
    state, states, sums = init(0), [jax.device_get(init(0))], []
    for batch in _batches(10):
        state, found = step(state, sharding.put_batch(batch, mesh), 0)
        states.append(jax.device_get(state))
        sums.append(jax.device_get(found))
    return states[0], states[1], states[-1], sums[0]


def _distance(tree, other):
    def relative(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(relative, tree, other)), default=0.0)


def _one():
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def _reference(norm):
    return _run(_one(), NORMS[norm])


def _assert_same(run, reference):
    before, first, tenth, sums = run
    _, their_first, their_tenth, their_sums = reference
    changes = [jax.tree.map(np.subtract, before.params, s.params) for s in (first, their_first)]
    assert _distance(*changes) < 1e-10  # the gradient, times the rate, with the decay
    assert _distance(first.batch_stats, their_first.batch_stats) < 1e-10
    assert _distance(sums, their_sums) < 1e-10
    assert _distance(tenth, their_tenth) < 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(2, 4), long((8, 1)), long((1, 8))])
@pytest.mark.parametrize("norm", NORMS)
def test_every_mesh_does_what_one_device_does(norm, shape):
    _assert_same(_run(sharding.make_mesh(*shape), NORMS[norm]), _reference(norm))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("parts", "shape"), [(2, (1, 1)), long(4, (4, 1)), long(4, (2, 2))])
def test_accumulated_gradients_are_those_of_the_batch(parts, shape):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    _assert_same(_run(mesh, NORMS["group"], num_microbatches=parts), _reference("group"))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("parts", "shape"), [(4, (2, 2)), long(2, (1, 1)), long(4, (1, 1)), long(2, (2, 1))]
)
def test_groups_of_k_that_divide_a_part_accumulate_exactly(parts, shape):
    # Also if a device has less than a group of each microbatch: (4, (2, 2)).
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    axes = {"ghost_batches": 4 // parts}
    _assert_same(
        _run(mesh, axes, num_microbatches=parts, bn_group_size=4), _reference("groups of 4")
    )


@pytest.mark.usefixtures("x64")
def test_the_comparison_sees_global_normalisation_that_accumulates():
    _, first, _, _ = _run(_one(), {}, num_microbatches=2)
    before, reference, _, _ = _reference("global")
    changes = [jax.tree.map(np.subtract, before.params, s.params) for s in (first, reference)]
    assert _distance(*changes) > 1e-2


def _compiled(shape, axes, batch=64, **settings):
    return _compiled_once(shape, tuple(axes.items()), batch, **settings)


@functools.cache
def _compiled_once(shape, axes, batch, **settings):
    mesh = sharding.make_mesh(*shape)
    init, step = _program(mesh, dict(axes), jnp.float32, **settings)
    state = jax.eval_shape(init, 0)
    arrays = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), next(_batches(1, batch))
    )
    return step.lower(state, arrays, 0).compile(), sum(
        leaf.size for leaf in jax.tree.leaves(state.params)
    )


WIDE = {"stage_features": (16, 16), "stem_features": 16}


def test_data_parallel_reduces_the_gradients_once_and_no_activations():
    norms = 5 * 16  # mean and variance of five normalisations, and their gradients
    for axes, more in (({}, 4 * norms + 200), ({"ghost_batches": 8}, 2 * norms + 200)):
        program, parameters = _compiled((8, 1), {**WIDE, **axes})
        found = collectives(program.as_text())
        assert {one.kind for one in found} == {"all-reduce"}
        total = sum(math.prod(shape) for one in found for shape in one.shapes)
        assert parameters <= total <= parameters + more


def test_normalisation_behind_1x1_reduces_moments_and_no_activations():
    axes = {**WIDE, "block": "bottleneck", **FUSED_1X1}
    program, parameters = _compiled((8, 1), axes)
    found = collectives(program.as_text())
    assert {one.kind for one in found} == {"all-reduce"}
    shapes = [shape for one in found for shape in one.shapes]
    # Moments of 16 channels, and those of the 64 of the second block's input, used twice.
    assert (16, 16) in shapes
    narrow, wide = 5, 4  # normalisations of 16 and 64 channels
    more = 4 * 16 * narrow + 4 * 64 * wide + 4 * 16 * (16 + 1) + 2 * 64 * (64 + 1) + 200
    assert parameters <= sum(map(math.prod, shapes)) <= parameters + more


def test_groups_within_a_device_and_group_normalisation_add_nothing():
    """Only the gradients, the statistics' mean and three sums are exchanged."""
    for axes in ({"ghost_batches": 32}, {"norm": "group"}):
        program, _ = _compiled((8, 1), {**WIDE, **axes})
        assert len(collectives(program.as_text())) <= 3
    program, _ = _compiled((8, 1), WIDE)
    assert len(collectives(program.as_text())) > 10  # which the global batch needs


@pytest.mark.parametrize("shape", [(2, 4), long((1, 8))])
def test_fsdp_gathers_parameters_and_no_activations(shape):
    # By default the compiler would gather kernels again for the backward pass.
    axes = {**WIDE, "ghost_batches": 8, "num_classes": 160}
    program, parameters = _compiled(shape, axes)
    for one in collectives(program.as_text()):
        assert one.kind in ("all-gather", "all-reduce"), one
        for dims in one.shapes:
            # Sides of kernels, channels and parts of them, classes, and a row of three taps of
            # three channels in the stem's gradient. An activation would have the batch's 64
            # examples or a device's 8.
            assert set(dims) <= {1, 2, 3, 4, 9, 16, 160}, one
            assert math.prod(dims) <= 16 * 160
    gathered = totals(collectives(program.as_text()))["all-gather"]["bytes"]
    assert 4 * 0.98 * parameters < gathered <= 4 * parameters  # once


def test_fsdp_divides_what_a_device_holds():
    """Parameters and momentum: a device has its part, and all that cannot be divided."""
    held = {
        shape: _compiled(shape, WIDE)[0].memory_analysis().argument_size_in_bytes
        - 64 // 8 * (8 * 8 * 3 + 5)  # its part of the batch
        for shape in ((8, 1), (2, 4), (1, 8))
    }
    assert held[2, 4] < 0.3 * held[8, 1]
    assert held[1, 8] < 0.18 * held[8, 1]


def test_accumulation_moves_no_images_between_devices():
    program, _ = _compiled(
        (8, 1), {**WIDE, "ghost_batches": 8}, num_microbatches=2, bn_group_size=4
    )
    kinds = totals(collectives(program.as_text()))
    assert set(kinds) == {"all-reduce"}, kinds


def test_collectives_are_read_from_every_form():
    hlo = """
      %a = f32[16,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8]
      %b = (f32[3]{0}, bf16[2,2]{1,0}, /*index=2*/s32[]) all-reduce(%x, %y, %z), channel_id=2
      %c = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
      %d = f32[32]{0} all-gather-done(%c)
      %e = f32[2]{0:T(256)} reduce-scatter(%x), to_apply=%add
      %f = f32[9]{0} add(%all-reduce.1, %x)
    }
    %fused (x: bf16[2,3]) -> bf16[2,6] {
      %g = bf16[2,6]{1,0} all-gather(%x), channel_id=7, dimensions={1}
    }
    %fused.1 (x: bf16[2,3]) -> bf16[2,6] {
      %h = bf16[2,6]{1,0} all-gather(%x), channel_id=7, dimensions={1}
      %i = bf16[2,7]{1,0} all-gather(%y), channel_id=7, dimensions={1}
    }
    %all-reduce-scatter (input: f32[2048,1000]) -> f32[256,1000] {
      %r = f32[2048,1000]{0,1} all-reduce(%input), channel_id=425
      ROOT %s = f32[256,1000]{0,1} dynamic-slice(%r, %i, %j)
    }
    """
    found = collectives(hlo)
    assert [(one.kind, one.bytes, one.largest) for one in found] == [
        ("all-reduce", 512, 128),
        ("all-reduce", 24, 4),
        ("all-gather", 128, 32),
        ("reduce-scatter", 8, 2),
        ("all-gather", 24, 12),
        ("all-gather", 28, 14),
        ("reduce-scatter", 1024000, 256000),
    ]
    assert totals(found)["all-reduce"] == {"count": 2, "bytes": 536, "largest": 128}

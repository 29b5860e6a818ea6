"""One device against eight, in float64; and other properties of a step."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from classifiers import classification
from devices import as_chosen_for_a_gpu
from marks import long

from resnet_flax import create_model, sharding
from resnet_flax.apply.tables import default_config
from resnet_flax.data.augment import crop_and_flip
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.evaluation.result import Metrics
from resnet_flax.training.compile import compile_init, compile_steps
from resnet_flax.training.optimizer import make_optimizer
from resnet_flax.training.state import init_state
from resnet_flax.training.steps import train_step

BATCH = 16


def _batches(n, size=8):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield {
            "image": rng.integers(0, 256, (BATCH, size, size, 1), np.uint8),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
            "mask": np.ones(BATCH, bool),
        }


@functools.cache
def _program(mesh, dtype, groups=1, tx=None):
    param_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    model = create_model(
        "cifar_resnet8",
        stage_sizes=(1, 1),
        stage_features=(8, 32),
        stem_features=8,
        dtype=dtype,
        param_dtype=param_dtype,
        ghost_batches=groups,
    )
    if tx is None:
        tx = make_optimizer(default_config().optim, optax.constant_schedule(0.1))
    norm = partial(Preprocessing(mean=(0.3,), std=(0.4,)).standardize, dtype=dtype)
    task = classification(
        model,
        lambda x, y, step, seed: (norm(crop_and_flip(x, step, seed=seed, pad=1, flip=True)), y),
        norm,
    )
    init, shardings = compile_init(
        partial(init_state, model=model, tx=tx, image_shape=(8, 8, 1)), mesh
    )
    return init, *compile_steps(
        mesh,
        shardings,
        partial(train_step, loss_fn=task.loss_fn, prepare=task.prepare, tx=tx),
        task.eval_step,
    )


def _run(mesh, steps, *, dtype=jnp.float64, **settings):
    init, step, _ = _program(mesh, dtype, **settings)
    state = init(0)
    for batch in _batches(steps):
        state, sums = step(state, sharding.put_batch(batch, mesh), 0)
    return jax.device_get((state, sums))


def _one():
    return sharding.make_mesh(devices=jax.devices()[:1])


def _distance(tree, other):
    """The largest distance between two trees' leaves, relative to each leaf's norm."""

    def relative(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(relative, tree, other)))


# Without momentum and decay, the change of parameters in a step of rate 1 is the gradient.
GRADIENT = optax.sgd(1.0)


@pytest.fixture(scope="module")
def reference():
    with jax.enable_x64(True):
        init, _, _ = _program(_one(), jnp.float64, tx=GRADIENT)
        before = jax.device_get(init(0))
        return before, _run(_one(), 1, tx=GRADIENT)


# test_sharding tests the same with decay and ten steps, in more cases.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [long((8, 1)), long((2, 4))])
def test_eight_devices_do_what_one_does(reference, shape):
    mesh = sharding.make_mesh(*shape)
    before, (after, sums) = reference
    tenth, _ = _run(_one(), 10)
    sharded, sharded_sums = _run(mesh, 1, tx=GRADIENT)
    gradient = jax.tree.map(np.subtract, before.params, after.params)
    sharded_gradient = jax.tree.map(np.subtract, before.params, sharded.params)
    assert _distance(sharded_gradient, gradient) < 1e-10
    assert _distance(sharded.batch_stats, after.batch_stats) < 1e-10
    assert _distance(sharded_sums, sums) < 1e-10
    assert _distance(_run(mesh, 10)[0], tenth) < 1e-8


@pytest.mark.usefixtures("x64")
def test_the_comparison_sees_statistics_that_are_not_global(reference):
    # What a sharding bug would do: each device normalises by its own part.
    before, (after, _) = reference
    local, _ = _run(sharding.make_mesh(), 1, tx=GRADIENT, groups=8)
    gradients = [jax.tree.map(np.subtract, before.params, s.params) for s in (local, after)]
    assert _distance(*gradients) > 1e-2
    assert _distance(local.batch_stats, after.batch_stats) > 1e-3


def test_parameters_lie_cut_where_fsdp_says():
    mesh = sharding.make_mesh(2, 4)
    init, step, _ = _program(mesh, jnp.float32)
    state = init(0)
    state, _ = step(state, sharding.put_batch(next(_batches(1)), mesh), 0)
    kernel = state.params["stage2_block1"]["conv2"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 3, 8, 32)
    momentum = jax.tree.leaves(state.opt_state)
    assert any(leaf.addressable_shards[0].data.shape == (3, 3, 8, 32) for leaf in momentum)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_the_batch_is_cut_over_all_devices(shape):
    batch = sharding.put_batch(next(_batches(1)), sharding.make_mesh(*shape))
    for array in batch.values():
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [BATCH // 8] * 8


@pytest.mark.usefixtures("x64")
def test_masked_examples_give_no_gradient():
    # Their labels change nothing, though batch normalisation sees their images.
    init, step, _ = _program(_one(), jnp.float64, tx=GRADIENT)
    batch = next(_batches(1))
    batch["mask"] = np.arange(BATCH) < 10
    results = []
    for label in (batch["label"], np.where(batch["mask"], batch["label"], 3).astype(np.int32)):
        results.append(
            jax.device_get(step(init(0), sharding.put_batch({**batch, "label": label}, _one()), 0))
        )
    (one, sums), (other, other_sums) = results
    assert sums["count"] == 10
    jax.tree.map(np.testing.assert_array_equal, (one, sums), (other, other_sums))


def test_initialisation_has_the_published_scale():
    model = create_model("cifar_resnet20")
    params = jax.jit(lambda: model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False))()
    kernel = params["params"]["stage3_block1"]["conv1"]["kernel"]  # 3 x 3 x 32 x 64
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.03)
    head = np.abs(params["params"]["head"]["kernel"])
    assert 0.9 / 8 < head.max() <= 1 / 8


def test_float32_smoke():
    one, _ = _run(_one(), 1, dtype=jnp.float32)
    eight, _ = _run(sharding.make_mesh(), 1, dtype=jnp.float32)
    assert _distance(eight.params, one.params) < 1e-3


def test_bfloat16_trains_as_float32_does():
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        init, step, _ = _program(_one(), dtype)
        state, batch = init(0), sharding.put_batch(next(_batches(1)), _one())
        losses[dtype] = []
        for _ in range(80):
            state, sums = step(state, batch, 0)
            losses[dtype].append(float(sums["loss"]) / BATCH)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    full, half = losses[jnp.float32], losses[jnp.bfloat16]
    assert half[0] != full[0]  # it is computed in another type
    assert abs(half[0] - full[0]) < 0.02 * full[0]
    assert full[-1] < 0.5 * full[0]
    assert half[-1] < 0.5 * half[0]


def test_the_state_is_donated():
    init, step, _ = _program(_one(), jnp.float32)
    state = init(0)
    step(state, sharding.put_batch(next(_batches(1)), _one()), 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_step_counts_its_batch():
    init, step, _ = _program(_one(), jnp.float32)
    state, sums = step(init(0), sharding.put_batch(next(_batches(1)), _one()), 0)
    assert int(state.step) == 1
    assert int(sums["count"]) == BATCH
    assert 0 <= int(sums["error"]) <= BATCH
    assert float(sums["loss"]) / BATCH == pytest.approx(np.log(10), rel=0.3)


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_counts_only_what_the_mask_lets_through(devices):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    init, _, evaluate = _program(mesh, jnp.float32)
    variables = init(0).variables
    batch = next(_batches(1))

    def of(batch):
        sums = evaluate(variables, sharding.put_batch(batch, mesh), Metrics(10).zeros())
        return jax.device_get(sums)

    each = []
    for i in range(BATCH):
        each.append(of({**batch, "mask": np.arange(BATCH) == i}))
        assert each[-1]["class_counts"]["count"].sum() == each[-1]["seen"] == 1
    some = np.arange(BATCH) % 3 == 0
    sums = of({**batch, "mask": some})
    wanted = [e for e, chosen in zip(each, some, strict=True) if chosen]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *wanted)
    # What a sum loses by rounding depends on its order.
    for states in (sums, expected):
        for name in ("loss", "calibration"):
            states[name] = states[name]["sum"] + states[name].pop("rest")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), sums, expected)


@pytest.mark.usefixtures("x64")
def test_norms_for_the_log_are_the_same_laid_end_to_end():
    from resnet_flax.training.norms import norm_over, tree_norm

    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 3, 4, 5)), "b": {"c": rng.normal(size=7), "d": np.float64(2)}}
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))
    norm = norm_over(sharding.make_mesh(1, 1, jax.devices()[:1]))
    for found in (tree_norm(tree), norm(tree)):
        np.testing.assert_allclose(found, whole, rtol=1e-14)

    def concatenated(platform):
        program = jax.jit(norm).trace(tree).lower(lowering_platforms=(platform,))
        return "stablehlo.concatenate" in program.as_text()

    assert concatenated("cuda")
    assert not concatenated("cpu")
    # Sharded leaves would be gathered to be concatenated.
    assert norm_over(sharding.make_mesh(1, 2, jax.devices()[:2])) is tree_norm


def test_norms_laid_end_to_end_are_of_all_leaves():
    from resnet_flax.training.norms import norm_over

    tree = {"a": jnp.full((2, 2), 1.0), "b": jnp.full(5, 3.0)}
    norm = norm_over(sharding.make_mesh(1, 1, jax.devices()[:1]))
    with as_chosen_for_a_gpu():
        assert float(norm(tree)) == 7.0


def test_a_network_without_statistics_takes_a_step():
    from resnet_flax.apply.experiment import make_programs
    from resnet_flax.apply.tables import check, override
    from resnet_flax.config import load_config

    config = load_config("configs/digits_resnet20.py")
    tiny = "stage_sizes=(1,) stage_features=(8,) stem_features=8 norm=group"
    override(config, [f"model.overrides={tiny}", "batch_size=8"])
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    _, programs = make_programs(check(config), mesh, 10, (8, 8, 1))
    image = np.zeros((8, 8, 8, 1), np.uint8)
    batch = {"image": image, "label": np.zeros(8, np.int32), "mask": np.ones(8, bool)}
    state, sums = programs.train_step(programs.init(0), batch, 0)
    assert int(state.step) == 1
    assert float(sums["stats_norm"]) == 0
    assert float(sums["param_norm"]) > 0
